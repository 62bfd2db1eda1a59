"""The worker's entry point (`ps-worker`), the local launcher (`ma-launch`) and the built-in workload.

`__main__`, `launch` and `report` are the commands. `supervise` runs a job from start to end on one of the `engines`;
`watch` tells what becomes of its workers. `demo` is the built-in workload; its workers report progress as `events`.
"""
