"""The worker's entry point (`ps-worker`), the local launcher (`ma-launch`) and the built-in workload.

`__main__` and `launch` read the flags. `local_cluster`, on `processes`, starts and ends what runs. `digits` trains;
`demo` collects the workers' `events`, which `view` shows and `report` draws.
"""
