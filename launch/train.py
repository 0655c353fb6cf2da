"""`fastft.launch` by its place in the checkout: `deepspeed launch/train.py ...`, `torchrun launch/train.py ...`."""

from fastft.launch import main

if __name__ == "__main__":
    main()
