"""What can be learnt of fastft on one GPU in less than ten minutes, without a network and without an installation.

    make gpu-kit      where there is a network: wheels and data, in .kit
    make gpu-day      on the GPU: all phases, results as JSON lines, a summary last
    python -m tools.gpu_day.collect FOLDER     afterwards: into benchmarks/results, beside what was predicted

Each module of `phases` is a phase: the names of its tasks, and what does one. The tasks run in child processes
(`fastft.doctor.child_tasks`), so that a kernel that breaks its process costs one task, and a phase that takes too long
itself.
"""
