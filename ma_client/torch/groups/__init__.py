"""Worker groups: several processes, the ranks of a group of torch.distributed, that are one worker of the job.

Rank 0 of the group is the worker's leader: it has the session and makes the rounds, with the same code as a worker of
one process. Where that code reads or writes the model, or asks for what every rank knows, the leader calls the other
ranks to take part. They follow: from the moment at which a round is due they do what the leader calls for, until it
says how the round ended.

| file | |
|---|---|
| `worker_group` | what is sent between the ranks |
| `calls` | what the leader says |
| `leader`, `follower` | the two roles, and how each trains |
| `mirror` | the center variables of a model that all ranks hold together |
| `replicated`, `dtensors`, `fsdp1` | the ways in which they may hold them |
"""
