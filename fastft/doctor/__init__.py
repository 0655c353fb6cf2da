"""The doctor: a machine -> what it is, and whether the kernels are right there.

To be read in this order:

    doctor.py         `fastft doctor`: `doctor`, `DoctorOptions`
    kernel_checks.py  each kernel against float64: `CASES`, `Sizes`, `GPU_SIZES`
    kernel_speeds.py  its speed beside others': `implementations`, `work_of`, `OURS`
    child_tasks.py    work that may take its process along: `Found`
"""
