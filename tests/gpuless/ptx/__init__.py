"""Runs the PTX that Triton and nvcc emit, in numpy, with every lane of many thread blocks in one array.

    parser      text of a kernel -> instructions with resolved operands; what it doesn't know, it refuses
    values      registers and immediates as numpy arrays
    arithmetic  instructions on registers        memory    loads, stores, asynchronous copies, bounds
    matrix      the tensor cores                 hazards   what no barrier orders
    machine     blocks, branches, barriers       triton_device, cuda_device   launchers and plans on top of it

An instruction, a modifier or a form of operand that is missing here raises :class:`parser.Refused` before the kernel runs.
A kernel that breaks a rule of the hardware raises :class:`parser.Fault`.
"""
