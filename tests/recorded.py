"""Environments of workers as launchers set them; where nothing else is said, of the second of two workers."""

from __future__ import annotations

import json
from collections.abc import Mapping

__all__ = ["PS_HOSTS", "kubernetes", "slurm", "tf_config", "torchrun", "without_a_cluster"]

PS_HOSTS = "10.0.0.7:2222"

# All variables of ours, of Slurm and of torchrun; those of others by name.
_PREFIXES = ("MA_", "SLURM_", "TORCHELASTIC_")
_NAMES = {"TF_CONFIG", "RANK", "WORLD_SIZE", "JOB_COMPLETION_INDEX"}


def without_a_cluster(environ: Mapping[str, str]) -> dict[str, str]:
    """An environment in which no launcher has left anything."""
    return {name: value for name, value in environ.items() if not name.startswith(_PREFIXES) and name not in _NAMES}


def slurm(task: int = 1) -> dict[str, str]:
    """What `srun python train.py` sets in a job of `sbatch --nodes=2 --ntasks-per-node=1 job.sh` (Slurm 23.11)."""
    return {
        "ENVIRONMENT": "BATCH",
        "HOSTNAME": "node07",
        "SLURMD_DEBUG": "2",
        "SLURMD_NODENAME": ("node07", "node08")[task],
        "SLURM_CLUSTER_NAME": "cluster",
        "SLURM_CONF": "/etc/slurm/slurm.conf",
        "SLURM_CPUS_ON_NODE": "4",
        "SLURM_CPU_BIND": "quiet,mask_cpu:0x0000000F",
        "SLURM_CPU_BIND_LIST": "0x0000000F",
        "SLURM_CPU_BIND_TYPE": "mask_cpu:",
        "SLURM_CPU_BIND_VERBOSE": "quiet",
        "SLURM_DISTRIBUTION": "cyclic",
        "SLURM_GTIDS": str(task),
        "SLURM_JOBID": "5816711",
        "SLURM_JOB_ACCOUNT": "research",
        "SLURM_JOB_CPUS_PER_NODE": "4(x2)",
        "SLURM_JOB_END_TIME": "1764003600",
        "SLURM_JOB_GID": "1000",
        "SLURM_JOB_ID": "5816711",
        "SLURM_JOB_NAME": "average",
        "SLURM_JOB_NODELIST": "node[07-08]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_PARTITION": "batch",
        "SLURM_JOB_QOS": "normal",
        "SLURM_JOB_START_TIME": "1764000000",
        "SLURM_JOB_UID": "1000",
        "SLURM_JOB_USER": "someone",
        "SLURM_LAUNCH_NODE_IPADDR": "10.1.1.7",
        "SLURM_LOCALID": "0",
        "SLURM_MEM_PER_CPU": "4096",
        "SLURM_MPI_TYPE": "pmix",
        "SLURM_NNODES": "2",
        "SLURM_NODEID": str(task),
        "SLURM_NODELIST": "node[07-08]",
        "SLURM_NPROCS": "2",
        "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "1",
        "SLURM_OOM_KILL_STEP": "0",
        "SLURM_PRIO_PROCESS": "0",
        "SLURM_PROCID": str(task),
        "SLURM_SRUN_COMM_HOST": "10.1.1.7",
        "SLURM_SRUN_COMM_PORT": "42447",
        "SLURM_STEPID": "0",
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_LAUNCHER_PORT": "42447",
        "SLURM_STEP_NODELIST": "node[07-08]",
        "SLURM_STEP_NUM_NODES": "2",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
        "SLURM_SUBMIT_DIR": "/home/someone",
        "SLURM_SUBMIT_HOST": "login1",
        "SLURM_TASKS_PER_NODE": "1(x2)",
        "SLURM_TASK_PID": str(40609 + task),
        "SLURM_TOPOLOGY_ADDR": ("node07", "node08")[task],
        "SLURM_TOPOLOGY_ADDR_PATTERN": "node",
        "SLURM_UMASK": "0022",
        "SRUN_DEBUG": "3",
    }


def torchrun(rank: int = 1) -> dict[str, str]:
    """What `torchrun --standalone --nproc-per-node 2 train.py` sets (torch 2.13)."""
    return {
        "GROUP_RANK": "0",
        "GROUP_WORLD_SIZE": "1",
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "34291",
        "OMP_NUM_THREADS": "1",
        "RANK": str(rank),
        "ROLE_NAME": "default",
        "ROLE_RANK": str(rank),
        "ROLE_WORLD_SIZE": "2",
        "TORCHELASTIC_ERROR_FILE": f"/tmp/none_7adaybad/attempt_0/{rank}/error.json",
        "TORCHELASTIC_MAX_RESTARTS": "0",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_RUN_ID": "0c4fd1a6-13f4-4650-b436-01f34e9250bc",
        "TORCHELASTIC_SIGNALS_TO_HANDLE": "SIGTERM,SIGINT,SIGHUP,SIGQUIT",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
        "WORLD_SIZE": "2",
    }


def kubernetes(index: int = 1, ps_hosts: str = PS_HOSTS) -> dict[str, str]:
    """The environment of a pod of an indexed Job `train` that sets MA_PS_HOSTS and MA_NUM_WORKERS (Kubernetes 1.31)."""
    return {
        "HOME": "/home/modelaverage",
        "HOSTNAME": f"train-{index}",
        "JOB_COMPLETION_INDEX": str(index),
        "KUBERNETES_PORT": "tcp://10.96.0.1:443",
        "KUBERNETES_PORT_443_TCP": "tcp://10.96.0.1:443",
        "KUBERNETES_PORT_443_TCP_ADDR": "10.96.0.1",
        "KUBERNETES_PORT_443_TCP_PORT": "443",
        "KUBERNETES_PORT_443_TCP_PROTO": "tcp",
        "KUBERNETES_SERVICE_HOST": "10.96.0.1",
        "KUBERNETES_SERVICE_PORT": "443",
        "KUBERNETES_SERVICE_PORT_HTTPS": "443",
        "MA_NUM_WORKERS": "2",
        "MA_PS_HOSTS": ps_hosts,
    }


def tf_config(index: int = 1, ps_hosts: str = PS_HOSTS) -> dict[str, str]:
    """What the launcher of a TensorFlow 1.15 estimator sets: a chief, and one worker beside it."""
    config = {
        "cluster": {"ps": ps_hosts.split(","), "chief": ["10.0.0.8:2222"], "worker": ["10.0.0.9:2222"]},
        "task": {"type": "worker" if index else "chief", "index": 0},
        "environment": "cloud",
    }
    return {"TF_CONFIG": json.dumps(config)}
