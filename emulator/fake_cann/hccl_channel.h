/* The shared memory between the ranks of one HCCL communicator: see hccl_channel.c. */
#ifndef FAKE_HCCL_CHANNEL_H
#define FAKE_HCCL_CHANNEL_H

#include "fake_cann.h"

#define FAKE_HCCL_MAX_RANKS 8
#define FAKE_HCCL_STAGING_BYTES ((size_t)1 << 20) /* of each rank; longer data goes through in rounds */
#define FAKE_HCCL_NAME_BYTES 112

/* HcclResult: hccl_types.h of CANN 8.5, as shipped in torch-npu's include folder. */
enum {
    HCCL_SUCCESS = 0,
    HCCL_E_PARA = 1,
    HCCL_E_PTR = 2,
    HCCL_E_MEMORY = 3,
    HCCL_E_INTERNAL = 4,
    HCCL_E_NOT_SUPPORT = 5,
    HCCL_E_SYSCALL = 8,
    HCCL_E_TIMEOUT = 9,
    HCCL_E_REMOTE = 21,
};

/* What a rank says it is calling.  All ranks of a communicator must call the same. */
struct fake_hccl_call {
    const char *name;
    int type;       /* HcclDataType */
    int operation;  /* HcclReduceOp, or -1 */
    int root;       /* or -1 */
    uint64_t count; /* elements; 0 where the ranks may differ */
};

struct fake_hccl_channel;

/* Makes a new, empty segment under an unguessable name; an HcclResult.  `name` holds FAKE_HCCL_NAME_BYTES. */
int fake_hccl_channel_create(char *name);

/*
 * Joins as `rank` of `ranks` and waits until all have.  `create`: whoever comes first makes the segment.  The name is
 * removed from /dev/shm once all have joined.
 */
int fake_hccl_channel_join(const char *name, bool create, unsigned ranks, unsigned rank,
                           struct fake_hccl_channel **channel);
void fake_hccl_channel_leave(struct fake_hccl_channel *channel);

/* HCCL_SUCCESS, or what broke this communicator for good. */
int fake_hccl_channel_state(const struct fake_hccl_channel *channel);

/* Says which call begins; errors of the channel name it. */
void fake_hccl_channel_begin(struct fake_hccl_channel *channel, const struct fake_hccl_call *call);

/* One round: wait until own staging is free, fill it, show it, wait for the others', read them, release them. */
int fake_hccl_round_open(struct fake_hccl_channel *channel);
int fake_hccl_round_show(struct fake_hccl_channel *channel);
void fake_hccl_round_close(struct fake_hccl_channel *channel);

/* A rank's staging area of FAKE_HCCL_STAGING_BYTES. */
char *fake_hccl_staging(struct fake_hccl_channel *channel, unsigned rank);

/* Messages from rank to rank, in order.  Sending does not wait for the receiver. */
int fake_hccl_message_send(struct fake_hccl_channel *channel, unsigned to, const void *data, size_t bytes);
int fake_hccl_message_receive(struct fake_hccl_channel *channel, unsigned from, void *data, size_t bytes);

/* hccl_reduce.c */
size_t fake_hccl_element_bytes(int type); /* 0: no such type */
bool fake_hccl_can_reduce(int type, int operation);
/* into[i] = sources[0][i] (op) ... (op) sources[ranks - 1][i], in that order.  16-bit floats are reduced in 32 bits. */
void fake_hccl_reduce(int type, int operation, void *into, const void *const *sources, unsigned ranks, size_t count);

#endif
