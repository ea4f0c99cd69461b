"""Weights from one process to others on the same host, through shared memory: for platforms without device IPC.

The trainer's process is the sender, each worker of the rollout engine a receiver.  Two buckets are filled in turn, so
that the copy into one overlaps with the loading of the other; a tensor larger than a bucket travels in pieces.

    sender                                            receiver, one for each worker
    listens on a socket without a file (`rendezvous`)
    Hello, and the buckets' file descriptor   ──►     checks version and seals, maps the buckets read-only
                                              ◄──     Ready
    fills bucket 0; Bucket(0, its pieces)     ──►     checks every piece, loads
    fills bucket 1; Bucket(1, ...)            ──►
    waits until bucket 0 is free              ◄──     Loaded(0)
    ...
    End(tensors, bytes, checksum)             ──►     checks them against what has come
                                              ◄──     Done
    either side, when it fails: Broken(reason), so that the other fails at once and with the reason

Nothing of it is in a file system: the buckets are a memfd, which travels over the socket, and the socket is abstract.
So a kill -9 leaves nothing behind, and nodes that share a temporary folder do not meet in it.

No pickle: messages are msgpack, checked field by field (`messages`).  This package imports neither verl nor vLLM.
"""
