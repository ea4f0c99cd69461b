/*
 * Stands in for libhccl: communicators and collectives between at most 8 ranks on one machine, over shared memory
 * (hccl_channel.c).  A collective runs in the calling thread, when it is launched, behind the stream's earlier work; it
 * returns when this rank's result is there, where hardware would return at once.
 * Leaves out: rank tables (HcclCommInitClusterInfo*), several machines, zero copy and registered memory, groups of
 * calls (HcclGroupStart), suspending, resuming and re-trying, determinism and algorithm settings (accepted, without
 * effect). A consequence of running at launch: two ranks that launch collectives of two communicators in opposite
 * orders wait for each other until the time-out, where two streams of the hardware might have passed.
 */
#define _GNU_SOURCE
#include "hccl_channel.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define ROOT_INFO_BYTES 4108  /* HCCL_ROOT_INFO_BYTES */
#define COMM_NAME_BYTES 128   /* COMM_NAME_MAX_LENGTH */
#define COMM_NAME_OFFSET 32   /* of HcclCommConfig.hcclCommName: 24 reserved bytes and two words stand before it */
#define KNOWN_CONFIGURATION 3 /* HcclGetCommConfigCapability: buffer size, determinism, communicator name */
#define NOTHING (-1)

static const char root_info_mark[16] = "fake_cann root";

struct root_info {
    char mark[sizeof root_info_mark];
    char segment[FAKE_HCCL_NAME_BYTES];
};

struct communicator { /* HcclComm */
    struct fake_hccl_channel *channel;
    unsigned ranks;
    unsigned rank;
    char segment[FAKE_HCCL_NAME_BYTES];
    char name[COMM_NAME_BYTES];
};

/* ---- communicators ---- */

static void name_communicator(struct communicator *communicator, const void *config)
{
    const char *wanted = config != NULL ? (const char *)config + COMM_NAME_OFFSET : "";
    if (wanted[0] != '\0') {
        snprintf(communicator->name, sizeof communicator->name, "%.*s", COMM_NAME_BYTES - 1, wanted);
    } else {
        snprintf(communicator->name, sizeof communicator->name, "%s", communicator->segment);
    }
}

static int join(const char *segment, bool create, unsigned ranks, unsigned rank, const void *config, void **handle)
{
    struct communicator *communicator = calloc(1, sizeof *communicator);
    if (communicator == NULL) {
        return HCCL_E_MEMORY;
    }
    communicator->ranks = ranks;
    communicator->rank = rank;
    snprintf(communicator->segment, sizeof communicator->segment, "%s", segment);
    name_communicator(communicator, config);
    int error = fake_hccl_channel_join(segment, create, ranks, rank, &communicator->channel);
    if (error != HCCL_SUCCESS) {
        free(communicator);
        return error;
    }
    *handle = communicator;
    return HCCL_SUCCESS;
}

FAKE_CANN_API int HcclGetRootInfo(void *root_info)
{
    fake_cann_trace(__func__);
    struct root_info info = {0};
    int error = fake_hccl_channel_create(info.segment);
    if (error != HCCL_SUCCESS) {
        return error;
    }
    memcpy(info.mark, root_info_mark, sizeof info.mark);
    memset(root_info, 0, ROOT_INFO_BYTES);
    memcpy(root_info, &info, sizeof info);
    return HCCL_SUCCESS;
}

FAKE_CANN_API int HcclCommInitRootInfoConfig(uint32_t ranks, const void *root_info, uint32_t rank, const void *config,
                                             void **communicator)
{
    fake_cann_trace(__func__);
    struct root_info info;
    memcpy(&info, root_info, sizeof info);
    if (memcmp(info.mark, root_info_mark, sizeof info.mark) != 0) {
        return fake_cann_fail(HCCL_E_PARA, "HCCL: rank %u of %u: this is not a root info of HcclGetRootInfo", rank,
                              ranks);
    }
    return join(info.segment, false, ranks, rank, config, communicator);
}

FAKE_CANN_API int HcclCommInitRootInfo(uint32_t ranks, const void *root_info, uint32_t rank, void **communicator)
{
    return HcclCommInitRootInfoConfig(ranks, root_info, rank, NULL, communicator);
}

/* A communicator of some ranks of another.  The ids that the caller gives make the name, so no root info is needed. */
FAKE_CANN_API int HcclCreateSubCommConfig(void **parent, uint32_t ranks, uint32_t *rank_ids, uint64_t id, uint32_t rank,
                                          const void *config, void **communicator)
{
    fake_cann_trace(__func__);
    if (rank_ids == NULL) { /* this rank has no part in it */
        *communicator = NULL;
        return HCCL_SUCCESS;
    }
    const struct communicator *whole = *parent;
    char segment[2 * FAKE_HCCL_NAME_BYTES];
    snprintf(segment, sizeof segment, "%s-%lx", whole->segment, (unsigned long)id);
    if (strlen(segment) >= FAKE_HCCL_NAME_BYTES) {
        return HCCL_E_NOT_SUPPORT;
    }
    return join(segment, true, ranks, rank, config, communicator);
}

struct joining {
    const char *segment;
    uint32_t ranks;
    uint32_t rank;
    void **communicator;
    int error;
};

static void *join_in_thread(void *argument)
{
    struct joining *joining = argument;
    joining->error = join(joining->segment, false, joining->ranks, joining->rank, NULL, joining->communicator);
    return NULL;
}

/* All ranks in this process; each is then to be used by a thread of its own. */
FAKE_CANN_API int HcclCommInitAll(uint32_t ranks, int32_t *devices, void **communicators)
{
    (void)devices;
    fake_cann_trace(__func__);
    if (ranks == 0 || ranks > FAKE_HCCL_MAX_RANKS) {
        return fake_cann_fail(HCCL_E_PARA, "HcclCommInitAll: %u ranks; this stand-in has 1 to %d", ranks,
                              FAKE_HCCL_MAX_RANKS);
    }
    char segment[FAKE_HCCL_NAME_BYTES];
    int error = fake_hccl_channel_create(segment);
    pthread_t threads[FAKE_HCCL_MAX_RANKS];
    struct joining joinings[FAKE_HCCL_MAX_RANKS];
    uint32_t started = 0;
    while (error == HCCL_SUCCESS && started < ranks) {
        joinings[started] = (struct joining){segment, ranks, started, &communicators[started], HCCL_SUCCESS};
        if (pthread_create(&threads[started], NULL, join_in_thread, &joinings[started]) != 0) {
            error = HCCL_E_SYSCALL;
            break;
        }
        started++;
    }
    for (uint32_t rank = 0; rank < started; rank++) {
        pthread_join(threads[rank], NULL);
        error = error != HCCL_SUCCESS ? error : joinings[rank].error;
    }
    return error;
}

FAKE_CANN_API int HcclCommDestroy(void *handle)
{
    fake_cann_trace(__func__);
    struct communicator *communicator = handle;
    if (communicator == NULL) {
        return HCCL_E_PTR;
    }
    fake_hccl_channel_leave(communicator->channel);
    free(communicator);
    return HCCL_SUCCESS;
}

FAKE_CANN_API int HcclGetCommName(void *handle, char *name)
{
    const struct communicator *communicator = handle;
    snprintf(name, COMM_NAME_BYTES, "%s", communicator->name);
    return HCCL_SUCCESS;
}

FAKE_CANN_API int HcclGetRankSize(void *handle, uint32_t *ranks)
{
    *ranks = ((const struct communicator *)handle)->ranks;
    return HCCL_SUCCESS;
}

FAKE_CANN_API int HcclGetRankId(void *handle, uint32_t *rank)
{
    *rank = ((const struct communicator *)handle)->rank;
    return HCCL_SUCCESS;
}

FAKE_CANN_API int HcclGetCommAsyncError(void *handle, int *error)
{
    *error = fake_hccl_channel_state(((const struct communicator *)handle)->channel);
    return HCCL_SUCCESS;
}

FAKE_CANN_API uint32_t HcclGetCommConfigCapability(void)
{
    return KNOWN_CONFIGURATION;
}

FAKE_CANN_API int HcclSetConfig(int config, int32_t value)
{
    (void)config;
    (void)value;
    return HCCL_SUCCESS;
}

FAKE_CANN_API int HcclCommResume(void *communicator)
{
    (void)communicator;
    fake_cann_refuse(__func__, "a broken communicator cannot be resumed here");
    return HCCL_E_NOT_SUPPORT;
}

FAKE_CANN_API const char *HcclGetErrorString(int error)
{
    switch (error) {
    case HCCL_SUCCESS:
        return "no error";
    case HCCL_E_PARA:
        return "parameter error";
    case HCCL_E_PTR:
        return "empty pointer";
    case HCCL_E_MEMORY:
        return "memory error";
    case HCCL_E_INTERNAL:
        return "internal error";
    case HCCL_E_NOT_SUPPORT:
        return "not support feature";
    case HCCL_E_SYSCALL:
        return "call system interface error";
    case HCCL_E_TIMEOUT:
        return "timeout";
    case HCCL_E_REMOTE:
        return "a remote rank failed";
    default:
        return "unknown error";
    }
}

/* ---- collectives ---- */

/* What one rank hands in and gets.  Counts and displacements are in elements. */
struct job {
    struct communicator *communicator;
    const char *send;
    char *receive;
    size_t element; /* bytes */
    int type;
    int operation;
    unsigned root;
    const uint64_t *send_counts; /* by destination */
    const uint64_t *send_displacements;
    const uint64_t *receive_counts; /* by source */
    const uint64_t *receive_displacements;
};

static int begin(struct job *job, const struct fake_hccl_call *call, void *stream)
{
    fake_cann_trace(call->name);
    job->type = call->type;
    job->operation = call->operation;
    job->root = call->root == NOTHING ? 0 : (unsigned)call->root;
    job->element = fake_hccl_element_bytes(call->type);
    bool bad_operation = call->operation != NOTHING && !fake_hccl_can_reduce(call->type, call->operation);
    if (job->element == 0 || bad_operation || job->root >= job->communicator->ranks) {
        return fake_cann_fail(HCCL_E_PARA, "Hccl%s: data type %d, reduction %d, root %d: not supported", call->name,
                              call->type, call->operation, call->root);
    }
    if (fake_cann_stream_drain(stream) != ACL_SUCCESS) {
        return HCCL_E_PARA;
    }
    fake_hccl_channel_begin(job->communicator->channel, call);
    return HCCL_SUCCESS;
}

/* How many of `count` elements fall into the piece of at most `piece` elements that begins at `start`. */
static uint64_t piece_length(uint64_t count, uint64_t start, uint64_t piece)
{
    if (count <= start) {
        return 0;
    }
    return count - start < piece ? count - start : piece;
}

typedef void (*take_piece)(const struct job *job, uint64_t start, uint64_t piece);

static uint64_t largest(const uint64_t *counts, unsigned ranks)
{
    uint64_t most = 0;
    for (unsigned rank = 0; rank < ranks; rank++) {
        most = counts[rank] > most ? counts[rank] : most;
    }
    return most;
}

/*
 * Every rank shows its own data, piece by piece, to all: `shown` elements here, `longest` on the rank that has most.
 * `take` then reads the others' staging areas.
 */
static int show_to_all(const struct job *job, uint64_t shown, uint64_t longest, take_piece take)
{
    struct fake_hccl_channel *channel = job->communicator->channel;
    uint64_t piece = FAKE_HCCL_STAGING_BYTES / job->element;
    for (uint64_t start = 0; start < longest; start += piece) {
        int error = fake_hccl_round_open(channel);
        if (error != HCCL_SUCCESS) {
            return error;
        }
        size_t bytes = piece_length(shown, start, piece) * job->element;
        if (bytes > 0) {
            memcpy(fake_hccl_staging(channel, job->communicator->rank), job->send + start * job->element, bytes);
        }
        error = fake_hccl_round_show(channel);
        if (error != HCCL_SUCCESS) {
            return error;
        }
        take(job, start, piece);
        fake_hccl_round_close(channel);
    }
    return HCCL_SUCCESS;
}

/* Elements of the part of a staging area that is meant for one destination. */
static uint64_t slot_elements(const struct job *job)
{
    return FAKE_HCCL_STAGING_BYTES / FAKE_HCCL_MAX_RANKS / job->element;
}

static char *slot(const struct job *job, unsigned from, unsigned to)
{
    char *staging = fake_hccl_staging(job->communicator->channel, from);
    return staging + to * (FAKE_HCCL_STAGING_BYTES / FAKE_HCCL_MAX_RANKS);
}

/* Every rank shows each other rank the data that is meant for it. */
static int show_to_each(const struct job *job, uint64_t longest, take_piece take)
{
    const struct communicator *communicator = job->communicator;
    uint64_t piece = slot_elements(job);
    for (uint64_t start = 0; start < longest; start += piece) {
        int error = fake_hccl_round_open(communicator->channel);
        if (error != HCCL_SUCCESS) {
            return error;
        }
        for (unsigned to = 0; to < communicator->ranks; to++) {
            size_t bytes = piece_length(job->send_counts[to], start, piece) * job->element;
            if (bytes > 0) {
                const char *from = job->send + (job->send_displacements[to] + start) * job->element;
                memcpy(slot(job, communicator->rank, to), from, bytes);
            }
        }
        error = fake_hccl_round_show(communicator->channel);
        if (error != HCCL_SUCCESS) {
            return error;
        }
        take(job, start, piece);
        fake_hccl_round_close(communicator->channel);
    }
    return HCCL_SUCCESS;
}

static void take_reduced(const struct job *job, uint64_t start, uint64_t piece)
{
    const struct communicator *communicator = job->communicator;
    const void *sources[FAKE_HCCL_MAX_RANKS];
    for (unsigned rank = 0; rank < communicator->ranks; rank++) {
        sources[rank] = fake_hccl_staging(communicator->channel, rank);
    }
    uint64_t length = piece_length(job->send_counts[0], start, piece);
    fake_hccl_reduce(job->type, job->operation, job->receive + start * job->element, sources, communicator->ranks,
                     length);
}

static void take_reduced_if_root(const struct job *job, uint64_t start, uint64_t piece)
{
    if (job->communicator->rank == job->root) {
        take_reduced(job, start, piece);
    }
}

static void take_from_root(const struct job *job, uint64_t start, uint64_t piece)
{
    if (job->communicator->rank != job->root) {
        size_t bytes = piece_length(job->send_counts[0], start, piece) * job->element;
        memcpy(job->receive + start * job->element, fake_hccl_staging(job->communicator->channel, job->root), bytes);
    }
}

static void take_from_all(const struct job *job, uint64_t start, uint64_t piece)
{
    for (unsigned from = 0; from < job->communicator->ranks; from++) {
        size_t bytes = piece_length(job->receive_counts[from], start, piece) * job->element;
        if (bytes > 0) {
            char *to = job->receive + (job->receive_displacements[from] + start) * job->element;
            memcpy(to, fake_hccl_staging(job->communicator->channel, from), bytes);
        }
    }
}

static void take_slots(const struct job *job, uint64_t start, uint64_t piece)
{
    for (unsigned from = 0; from < job->communicator->ranks; from++) {
        size_t bytes = piece_length(job->receive_counts[from], start, piece) * job->element;
        if (bytes > 0) {
            char *to = job->receive + (job->receive_displacements[from] + start) * job->element;
            memcpy(to, slot(job, from, job->communicator->rank), bytes);
        }
    }
}

static void take_slots_reduced(const struct job *job, uint64_t start, uint64_t piece)
{
    const struct communicator *communicator = job->communicator;
    const void *sources[FAKE_HCCL_MAX_RANKS];
    for (unsigned from = 0; from < communicator->ranks; from++) {
        sources[from] = slot(job, from, communicator->rank);
    }
    uint64_t length = piece_length(job->send_counts[communicator->rank], start, piece);
    if (length > 0) {
        char *to = job->receive + start * job->element;
        fake_hccl_reduce(job->type, job->operation, to, sources, communicator->ranks, length);
    }
}

FAKE_CANN_API int HcclAllReduce(void *send, void *receive, uint64_t count, int type, int operation, void *communicator,
                                void *stream)
{
    struct job job = {.communicator = communicator, .send = send, .receive = receive, .send_counts = &count};
    struct fake_hccl_call call = {"AllReduce", type, operation, NOTHING, count};
    int error = begin(&job, &call, stream);
    return error != HCCL_SUCCESS ? error : show_to_all(&job, count, count, take_reduced);
}

FAKE_CANN_API int HcclReduce(void *send, void *receive, uint64_t count, int type, int operation, uint32_t root,
                             void *communicator, void *stream)
{
    struct job job = {.communicator = communicator, .send = send, .receive = receive, .send_counts = &count};
    struct fake_hccl_call call = {"Reduce", type, operation, (int)root, count};
    int error = begin(&job, &call, stream);
    return error != HCCL_SUCCESS ? error : show_to_all(&job, count, count, take_reduced_if_root);
}

FAKE_CANN_API int HcclBroadcast(void *buffer, uint64_t count, int type, uint32_t root, void *communicator, void *stream)
{
    struct job job = {.communicator = communicator, .send = buffer, .receive = buffer, .send_counts = &count};
    struct fake_hccl_call call = {"Broadcast", type, NOTHING, (int)root, count};
    int error = begin(&job, &call, stream);
    if (error != HCCL_SUCCESS) {
        return error;
    }
    uint64_t shown = job.communicator->rank == root ? count : 0;
    return show_to_all(&job, shown, count, take_from_root);
}

/* The tables of a collective in which every pair of ranks exchanges `count` elements. */
struct uniform {
    uint64_t counts[FAKE_HCCL_MAX_RANKS];
    uint64_t displacements[FAKE_HCCL_MAX_RANKS];
};

static struct uniform uniform_tables(uint64_t count)
{
    struct uniform tables;
    for (unsigned rank = 0; rank < FAKE_HCCL_MAX_RANKS; rank++) {
        tables.counts[rank] = count;
        tables.displacements[rank] = count * rank;
    }
    return tables;
}

FAKE_CANN_API int HcclAllGatherV(void *send, uint64_t send_count, void *receive, const void *counts,
                                 const void *displacements, int type, void *communicator, void *stream)
{
    struct job job = {.communicator = communicator,
                      .send = send,
                      .receive = receive,
                      .receive_counts = counts,
                      .receive_displacements = displacements};
    struct fake_hccl_call call = {"AllGatherV", type, NOTHING, NOTHING, 0};
    int error = begin(&job, &call, stream);
    if (error != HCCL_SUCCESS) {
        return error;
    }
    uint64_t own = job.receive_counts[job.communicator->rank];
    if (own != send_count) {
        return fake_cann_fail(HCCL_E_PARA, "HcclAllGatherV: rank %u sends %lu elements, its receive count says %lu",
                              job.communicator->rank, (unsigned long)send_count, (unsigned long)own);
    }
    return show_to_all(&job, send_count, largest(job.receive_counts, job.communicator->ranks), take_from_all);
}

FAKE_CANN_API int HcclAllGather(void *send, void *receive, uint64_t count, int type, void *communicator, void *stream)
{
    struct uniform tables = uniform_tables(count);
    struct job job = {.communicator = communicator,
                      .send = send,
                      .receive = receive,
                      .receive_counts = tables.counts,
                      .receive_displacements = tables.displacements};
    struct fake_hccl_call call = {"AllGather", type, NOTHING, NOTHING, count};
    int error = begin(&job, &call, stream);
    return error != HCCL_SUCCESS ? error : show_to_all(&job, count, count, take_from_all);
}

FAKE_CANN_API int HcclReduceScatterV(void *send, const void *counts, const void *displacements, void *receive,
                                     uint64_t receive_count, int type, int operation, void *communicator, void *stream)
{
    struct job job = {.communicator = communicator,
                      .send = send,
                      .receive = receive,
                      .send_counts = counts,
                      .send_displacements = displacements};
    struct fake_hccl_call call = {"ReduceScatterV", type, operation, NOTHING, 0};
    int error = begin(&job, &call, stream);
    if (error != HCCL_SUCCESS) {
        return error;
    }
    uint64_t own = job.send_counts[job.communicator->rank];
    if (own != receive_count) {
        return fake_cann_fail(HCCL_E_PARA, "HcclReduceScatterV: rank %u receives %lu elements, its send count says %lu",
                              job.communicator->rank, (unsigned long)receive_count, (unsigned long)own);
    }
    return show_to_each(&job, largest(job.send_counts, job.communicator->ranks), take_slots_reduced);
}

FAKE_CANN_API int HcclReduceScatter(void *send, void *receive, uint64_t count, int type, int operation,
                                    void *communicator, void *stream)
{
    struct uniform tables = uniform_tables(count);
    struct job job = {.communicator = communicator,
                      .send = send,
                      .receive = receive,
                      .send_counts = tables.counts,
                      .send_displacements = tables.displacements};
    struct fake_hccl_call call = {"ReduceScatter", type, operation, NOTHING, count};
    int error = begin(&job, &call, stream);
    return error != HCCL_SUCCESS ? error : show_to_each(&job, count, take_slots_reduced);
}

FAKE_CANN_API int HcclScatter(void *send, void *receive, uint64_t count, int type, uint32_t root, void *communicator,
                              void *stream)
{
    struct uniform sent = uniform_tables(count);
    struct uniform received = uniform_tables(0);
    struct job job = {.communicator = communicator,
                      .send = send,
                      .receive = receive,
                      .send_counts = sent.counts,
                      .send_displacements = sent.displacements,
                      .receive_counts = received.counts,
                      .receive_displacements = received.displacements};
    struct fake_hccl_call call = {"Scatter", type, NOTHING, (int)root, count};
    int error = begin(&job, &call, stream);
    if (error != HCCL_SUCCESS) {
        return error;
    }
    received.counts[root] = count;
    if (job.communicator->rank != root) {
        memset(sent.counts, 0, sizeof sent.counts);
    }
    return show_to_each(&job, count, take_slots);
}

FAKE_CANN_API int HcclAlltoAll(const void *send, uint64_t send_count, int send_type, const void *receive,
                               uint64_t receive_count, int receive_type, void *communicator, void *stream)
{
    struct uniform sent = uniform_tables(send_count);
    struct uniform received = uniform_tables(receive_count);
    if (send_count != receive_count || send_type != receive_type) {
        return fake_cann_fail(HCCL_E_PARA, "HcclAlltoAll: send and receive differ in count or type");
    }
    struct job job = {.communicator = communicator,
                      .send = send,
                      .receive = (char *)receive,
                      .send_counts = sent.counts,
                      .send_displacements = sent.displacements,
                      .receive_counts = received.counts,
                      .receive_displacements = received.displacements};
    struct fake_hccl_call call = {"AlltoAll", send_type, NOTHING, NOTHING, send_count};
    int error = begin(&job, &call, stream);
    return error != HCCL_SUCCESS ? error : show_to_each(&job, send_count, take_slots);
}

/* Shows all ranks how much each sends to each; checks what this one expects; the largest of all counts in `longest`. */
static int agree_on_counts(const struct job *job, uint64_t *longest)
{
    const struct communicator *communicator = job->communicator;
    size_t row_bytes = communicator->ranks * sizeof(uint64_t);
    int error = fake_hccl_round_open(communicator->channel);
    if (error != HCCL_SUCCESS) {
        return error;
    }
    memcpy(fake_hccl_staging(communicator->channel, communicator->rank), job->send_counts, row_bytes);
    error = fake_hccl_round_show(communicator->channel);
    if (error != HCCL_SUCCESS) {
        return error;
    }
    *longest = 0;
    bool equal = true;
    for (unsigned from = 0; from < communicator->ranks; from++) {
        uint64_t row[FAKE_HCCL_MAX_RANKS];
        memcpy(row, fake_hccl_staging(communicator->channel, from), row_bytes);
        uint64_t most = largest(row, communicator->ranks);
        *longest = most > *longest ? most : *longest;
        if (row[communicator->rank] != job->receive_counts[from]) {
            fake_cann_fail(HCCL_E_PARA, "HcclAlltoAllV: rank %u sends %lu elements to rank %u, which expects %lu", from,
                           (unsigned long)row[communicator->rank], communicator->rank,
                           (unsigned long)job->receive_counts[from]);
            equal = false;
        }
    }
    fake_hccl_round_close(communicator->channel);
    return equal ? HCCL_SUCCESS : HCCL_E_PARA;
}

FAKE_CANN_API int HcclAlltoAllV(const void *send, const void *send_counts, const void *send_displacements,
                                int send_type, const void *receive, const void *receive_counts,
                                const void *receive_displacements, int receive_type, void *communicator, void *stream)
{
    if (send_type != receive_type) {
        return fake_cann_fail(HCCL_E_PARA, "HcclAlltoAllV: send and receive differ in type");
    }
    struct job job = {.communicator = communicator,
                      .send = send,
                      .receive = (char *)receive,
                      .send_counts = send_counts,
                      .send_displacements = send_displacements,
                      .receive_counts = receive_counts,
                      .receive_displacements = receive_displacements};
    struct fake_hccl_call call = {"AlltoAllV", send_type, NOTHING, NOTHING, 0};
    uint64_t longest = 0;
    int error = begin(&job, &call, stream);
    if (error == HCCL_SUCCESS) {
        error = agree_on_counts(&job, &longest);
    }
    return error != HCCL_SUCCESS ? error : show_to_each(&job, longest, take_slots);
}

/* As AlltoAllV, with the whole matrix of counts ([source][destination]) on every rank and no gaps in the buffers. */
FAKE_CANN_API int HcclAlltoAllVC(const void *send, const void *matrix, int send_type, const void *receive,
                                 int receive_type, void *communicator, void *stream)
{
    const struct communicator *group = communicator;
    const uint64_t *counts = matrix;
    struct uniform sent = uniform_tables(0);
    struct uniform received = uniform_tables(0);
    uint64_t send_end = 0;
    uint64_t receive_end = 0;
    for (unsigned other = 0; other < group->ranks; other++) {
        sent.counts[other] = counts[group->rank * group->ranks + other];
        received.counts[other] = counts[other * group->ranks + group->rank];
        sent.displacements[other] = send_end;
        received.displacements[other] = receive_end;
        send_end += sent.counts[other];
        receive_end += received.counts[other];
    }
    return HcclAlltoAllV(send, sent.counts, sent.displacements, send_type, receive, received.counts,
                         received.displacements, receive_type, communicator, stream);
}

static void take_nothing(const struct job *job, uint64_t start, uint64_t piece)
{
    (void)job;
    (void)start;
    (void)piece;
}

FAKE_CANN_API int HcclBarrier(void *communicator, void *stream)
{
    static const char byte[1];
    struct job job = {.communicator = communicator, .send = byte};
    struct fake_hccl_call call = {"Barrier", 0, NOTHING, NOTHING, 1};
    int error = begin(&job, &call, stream);
    return error != HCCL_SUCCESS ? error : show_to_all(&job, 1, 1, take_nothing);
}

/* ---- from rank to rank ---- */

enum { ITEM_SEND = 0, ITEM_RECEIVE = 1 };

struct item { /* HcclSendRecvItem */
    int kind;
    void *buffer;
    uint64_t count;
    int type;
    uint32_t remote;
};

static int transfer(const char *name, struct communicator *communicator, const struct item *item, void *stream)
{
    struct job job = {.communicator = communicator};
    struct fake_hccl_call call = {name, item->type, NOTHING, (int)item->remote, item->count};
    int error = begin(&job, &call, stream);
    if (error != HCCL_SUCCESS) {
        return error;
    }
    size_t bytes = item->count * job.element;
    if (item->kind == ITEM_SEND) {
        return fake_hccl_message_send(communicator->channel, item->remote, item->buffer, bytes);
    }
    return fake_hccl_message_receive(communicator->channel, item->remote, item->buffer, bytes);
}

FAKE_CANN_API int HcclSend(void *buffer, uint64_t count, int type, uint32_t to, void *communicator, void *stream)
{
    struct item item = {ITEM_SEND, buffer, count, type, to};
    return transfer("Send", communicator, &item, stream);
}

FAKE_CANN_API int HcclRecv(void *buffer, uint64_t count, int type, uint32_t from, void *communicator, void *stream)
{
    struct item item = {ITEM_RECEIVE, buffer, count, type, from};
    return transfer("Recv", communicator, &item, stream);
}

/* All sends first: they wait for nobody. */
FAKE_CANN_API int HcclBatchSendRecv(const struct item *items, uint32_t count, void *communicator, void *stream)
{
    for (int kind = ITEM_SEND; kind <= ITEM_RECEIVE; kind++) {
        for (uint32_t i = 0; i < count; i++) {
            int error = HCCL_SUCCESS;
            if (items[i].kind == kind) {
                error = transfer("BatchSendRecv", communicator, &items[i], stream);
            }
            if (error != HCCL_SUCCESS) {
                return error;
            }
        }
    }
    return HCCL_SUCCESS;
}
