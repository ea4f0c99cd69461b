/*
 * The shared memory between the ranks of one HCCL communicator: processes (or threads) of one machine, at most 8.
 *
 * One file in /dev/shm, under a random name that only the root info carries, mode 0600, and without a name as soon as
 * all ranks have mapped it, so that nothing stays behind however they end.  In it:
 *
 *   - a staging area per rank, for collectives, which go through it in rounds;
 *   - behind the mapped part, messages from rank to rank: each is written at an offset of its own, and its pages are
 * given back when it has been read.  A sender therefore never waits for its receiver.
 *
 * A rank holds a POSIX lock on one byte of the file for as long as its process lives, killed or not; that is how the
 * others know.  They look every 20 ms while they wait, and break the communicator for all ranks when somebody is gone
 * or late.
 */
#define _GNU_SOURCE
#include "hccl_channel.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define LOOK_EVERY_NS 20000000L
#define YIELDS_BEFORE_SLEEP 32
#define MESSAGES_AT_ONCE 1024 /* that wait in one pipe; a sender waits beyond that */
#define PAGE 4096

struct shared_call { /* fake_hccl_call, without pointers or padding: it is compared byte by byte */
    char name[24];
    uint64_t count;
    int32_t type;
    int32_t operation;
    int32_t root;
    int32_t always_zero;
};

struct rank_state {
    _Alignas(64) uint32_t joined; /* these words are futexes */
    uint32_t shown;               /* rounds whose staging area is filled */
    uint32_t released;            /* rounds in which this rank has read all others */
    uint32_t left;
    int32_t process;
    struct shared_call call;
};

struct message {
    uint64_t offset;
    uint64_t bytes;
};

struct pipe {
    _Alignas(64) uint32_t written;
    _Alignas(64) uint32_t read;
    struct message messages[MESSAGES_AT_ONCE];
};

struct segment {
    uint32_t ranks;
    uint32_t joined;
    uint32_t broken;      /* HcclResult */
    uint64_t next_offset; /* of a message in the file */
    struct rank_state rank[FAKE_HCCL_MAX_RANKS];
    struct pipe pipe[FAKE_HCCL_MAX_RANKS][FAKE_HCCL_MAX_RANKS]; /* [from][to] */
    _Alignas(PAGE) char staging[FAKE_HCCL_MAX_RANKS][FAKE_HCCL_STAGING_BYTES];
};

struct fake_hccl_channel {
    struct segment *segment;
    int file;
    unsigned ranks;
    unsigned rank;
    uint32_t round;
    bool first_round; /* of the call that runs */
    char name[FAKE_HCCL_NAME_BYTES];
    struct shared_call call;
};

/* Segments that this process has created and not joined yet: the file must stay open, for its locks. */
struct created {
    char name[FAKE_HCCL_NAME_BYTES];
    int file;
    struct created *next;
};

static pthread_mutex_t created_lock = PTHREAD_MUTEX_INITIALIZER;
static struct created *created_segments;

/* ---- time and waiting ---- */

static double seconds_now(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

/* HCCL_EXEC_TIMEOUT=0 means "for ever", as in CANN's documentation of that variable. */
static double seconds_of(const char *variable, long otherwise)
{
    long seconds = fake_cann_environment(variable, otherwise);
    return seconds > 0 ? (double)seconds : 1e9;
}

static double execution_timeout(void)
{
    return seconds_of("HCCL_EXEC_TIMEOUT", fake_cann_environment("FAKE_CANN_TIMEOUT_S", 60));
}

static double connection_timeout(void)
{
    return seconds_of("HCCL_CONNECT_TIMEOUT", fake_cann_environment("FAKE_CANN_TIMEOUT_S", 120));
}

static void futex_wait(uint32_t *word, uint32_t value)
{
    struct timespec limit = {0, LOOK_EVERY_NS};
    syscall(SYS_futex, word, FUTEX_WAIT, value, &limit, NULL, 0);
}

static void raise_word(uint32_t *word, uint32_t value)
{
    __atomic_store_n(word, value, __ATOMIC_RELEASE);
    syscall(SYS_futex, word, FUTEX_WAKE, INT_MAX, NULL, NULL, 0);
}

static uint32_t word_of(const uint32_t *word)
{
    return __atomic_load_n(word, __ATOMIC_ACQUIRE);
}

/* ---- who is there ---- */

static bool hold_rank_lock(int file, unsigned rank)
{
    struct flock mine = {.l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = rank, .l_len = 1};
    return fcntl(file, F_SETLK, &mine) == 0;
}

static bool is_alive(const struct fake_hccl_channel *channel, unsigned rank)
{
    if (channel->segment->rank[rank].process == getpid()) {
        return true;
    }
    struct flock theirs = {.l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = rank, .l_len = 1};
    return fcntl(channel->file, F_GETLK, &theirs) != 0 || theirs.l_type != F_UNLCK;
}

/* The first to find something wrong says so; the communicator is of no use to anybody from then on. */
static int break_channel(struct fake_hccl_channel *channel, int error, const char *what)
{
    uint32_t intact = HCCL_SUCCESS;
    __atomic_compare_exchange_n(&channel->segment->broken, &intact, (uint32_t)error, false, __ATOMIC_SEQ_CST,
                                __ATOMIC_SEQ_CST);
    return fake_cann_fail(error, "HCCL: rank %u of %u, in %s: %s", channel->rank, channel->ranks, channel->call.name,
                          what);
}

static int broken_by_other(struct fake_hccl_channel *channel)
{
    int error = (int)word_of(&channel->segment->broken);
    for (unsigned rank = 0; rank < channel->ranks; rank++) {
        if (word_of(&channel->segment->rank[rank].joined) && !is_alive(channel, rank)) {
            return fake_cann_fail(error, "HCCL: rank %u of %u, in %s: rank %u (process %d) has ended", channel->rank,
                                  channel->ranks, channel->call.name, rank, channel->segment->rank[rank].process);
        }
    }
    return fake_cann_fail(error, "HCCL: rank %u of %u, in %s: the communicator was broken by another rank's error",
                          channel->rank, channel->ranks, channel->call.name);
}

static int gone(struct fake_hccl_channel *channel, unsigned rank)
{
    char what[160];
    const struct rank_state *state = &channel->segment->rank[rank];
    if (word_of(&state->left)) {
        snprintf(what, sizeof what, "rank %u (process %d) has destroyed its communicator", rank, state->process);
    } else {
        snprintf(what, sizeof what, "rank %u (process %d) has ended", rank, state->process);
    }
    return break_channel(channel, HCCL_E_REMOTE, what);
}

static int late(struct fake_hccl_channel *channel, unsigned rank, double limit)
{
    char what[200];
    snprintf(
        what, sizeof what,
        "rank %u did not come within %.0f s (HCCL_EXEC_TIMEOUT, HCCL_CONNECT_TIMEOUT or FAKE_CANN_TIMEOUT_S sets this)",
        rank, limit);
    return break_channel(channel, HCCL_E_TIMEOUT, what);
}

static bool reached(const uint32_t *word, uint32_t target)
{
    return (int32_t)(word_of(word) - target) >= 0; /* counters may wrap */
}

/* Waits until `rank` has raised its word to `target`. */
static int await_word(struct fake_hccl_channel *channel, unsigned rank, uint32_t *word, uint32_t target, double limit)
{
    for (int i = 0; i < YIELDS_BEFORE_SLEEP; i++) {
        if (reached(word, target)) {
            return HCCL_SUCCESS;
        }
        sched_yield();
    }
    const struct rank_state *state = &channel->segment->rank[rank];
    double deadline = seconds_now() + limit;
    while (!reached(word, target)) {
        uint32_t seen = word_of(word);
        if (reached(word, target)) {
            break;
        }
        futex_wait(word, seen);
        if (reached(word, target)) {
            break;
        }
        if (fake_hccl_channel_state(channel) != HCCL_SUCCESS) {
            return broken_by_other(channel);
        }
        bool is_gone = word_of(&state->left) || (word_of(&state->joined) && !is_alive(channel, rank));
        if (is_gone && !reached(word, target)) { /* it may have done its part and gone since */
            return gone(channel, rank);
        }
        if (seconds_now() > deadline) {
            return late(channel, rank, limit);
        }
    }
    return HCCL_SUCCESS;
}

/* ---- making and joining ---- */

static void remove_name(const char *name)
{
    char path[NAME_MAX];
    snprintf(path, sizeof path, "/dev/shm/fake_cann-%s", name);
    unlink(path);
}

static int create_file(const char *name)
{
    int file = fake_cann_create_shared(name);
    if (file >= 0 && ftruncate(file, (off_t)sizeof(struct segment)) != 0) {
        remove_name(name);
        close(file);
        return -1;
    }
    return file;
}

int fake_hccl_channel_create(char *name)
{
    unsigned char secret[16];
    if (getrandom(secret, sizeof secret, 0) != (ssize_t)sizeof secret) {
        return HCCL_E_SYSCALL;
    }
    size_t length = (size_t)snprintf(name, FAKE_HCCL_NAME_BYTES, "hccl-");
    for (size_t i = 0; i < sizeof secret; i++) {
        length += (size_t)snprintf(name + length, FAKE_HCCL_NAME_BYTES - length, "%02x", secret[i]);
    }
    struct created *entry = calloc(1, sizeof *entry);
    int file = entry != NULL ? create_file(name) : -1;
    if (file < 0) {
        free(entry);
        return fake_cann_fail(HCCL_E_SYSCALL, "HCCL: no shared memory in /dev/shm: %s", strerror(errno));
    }
    snprintf(entry->name, sizeof entry->name, "%s", name);
    entry->file = file;
    pthread_mutex_lock(&created_lock);
    entry->next = created_segments;
    created_segments = entry;
    pthread_mutex_unlock(&created_lock);
    return HCCL_SUCCESS;
}

/* A root info that nobody used. */
__attribute__((destructor)) static void remove_unused_segments(void)
{
    for (struct created *entry = created_segments; entry != NULL; entry = entry->next) {
        remove_name(entry->name);
    }
}

/* The open file of a segment that this process has created; -1 when it has not. */
static int take_created(const char *name)
{
    int file = -1;
    pthread_mutex_lock(&created_lock);
    for (struct created **link = &created_segments; *link != NULL; link = &(*link)->next) {
        if (strcmp((*link)->name, name) == 0) {
            struct created *entry = *link;
            file = entry->file;
            *link = entry->next;
            free(entry);
            break;
        }
    }
    pthread_mutex_unlock(&created_lock);
    return file;
}

static int open_file(const char *name, bool create)
{
    char path[NAME_MAX];
    snprintf(path, sizeof path, "/dev/shm/fake_cann-%s", name);
    int file = take_created(name);
    if (file < 0 && create) {
        file = create_file(name);
    }
    for (int attempt = 0; file < 0 && attempt < 100; attempt++) {
        file = open(path, O_RDWR | O_CLOEXEC | O_NOFOLLOW);
    }
    struct stat status = {0};
    for (int attempt = 0; file >= 0 && attempt < 1000; attempt++) { /* its creator may not have sized it yet */
        if (fstat(file, &status) == 0 && (size_t)status.st_size >= sizeof(struct segment)) {
            return file;
        }
        usleep(1000);
    }
    if (file >= 0) {
        close(file);
    }
    return -1;
}

static int await_everybody(struct fake_hccl_channel *channel)
{
    int error = HCCL_SUCCESS;
    for (unsigned rank = 0; rank < channel->ranks && error == HCCL_SUCCESS; rank++) {
        error = await_word(channel, rank, &channel->segment->rank[rank].joined, 1, connection_timeout());
    }
    return error;
}

int fake_hccl_channel_join(const char *name, bool create, unsigned ranks, unsigned rank,
                           struct fake_hccl_channel **result)
{
    if (ranks == 0 || ranks > FAKE_HCCL_MAX_RANKS || rank >= ranks) {
        return fake_cann_fail(HCCL_E_PARA, "HCCL: rank %u of %u: this stand-in has 1 to %d ranks", rank, ranks,
                              FAKE_HCCL_MAX_RANKS);
    }
    struct fake_hccl_channel *channel = calloc(1, sizeof *channel);
    int file = channel != NULL ? open_file(name, create) : -1;
    if (file < 0) {
        free(channel);
        return fake_cann_fail(HCCL_E_SYSCALL, "HCCL: rank %u of %u: the root info's segment is not there", rank, ranks);
    }
    void *mapped = mmap(NULL, sizeof(struct segment), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (mapped == MAP_FAILED || !hold_rank_lock(file, rank)) {
        close(file);
        free(channel);
        return fake_cann_fail(HCCL_E_SYSCALL, "HCCL: rank %u of %u: %s", rank, ranks, strerror(errno));
    }
    *channel = (struct fake_hccl_channel){.segment = mapped, .file = file, .ranks = ranks, .rank = rank};
    snprintf(channel->name, sizeof channel->name, "%s", name);
    snprintf(channel->call.name, sizeof channel->call.name, "initialisation");
    channel->segment->ranks = ranks;
    channel->segment->rank[rank].process = getpid();
    raise_word(&channel->segment->rank[rank].joined, 1);
    if (__atomic_add_fetch(&channel->segment->joined, 1, __ATOMIC_SEQ_CST) == ranks) {
        remove_name(name);
    }
    int error = await_everybody(channel);
    if (error != HCCL_SUCCESS) {
        remove_name(name);
        fake_hccl_channel_leave(channel);
        return error;
    }
    *result = channel;
    return HCCL_SUCCESS;
}

void fake_hccl_channel_leave(struct fake_hccl_channel *channel)
{
    raise_word(&channel->segment->rank[channel->rank].left, 1);
    munmap(channel->segment, sizeof *channel->segment);
    close(channel->file);
    free(channel);
}

int fake_hccl_channel_state(const struct fake_hccl_channel *channel)
{
    return (int)word_of(&channel->segment->broken);
}

/* ---- rounds ---- */

char *fake_hccl_staging(struct fake_hccl_channel *channel, unsigned rank)
{
    return channel->segment->staging[rank];
}

void fake_hccl_channel_begin(struct fake_hccl_channel *channel, const struct fake_hccl_call *call)
{
    channel->call = (struct shared_call){
        .type = call->type, .operation = call->operation, .root = call->root, .count = call->count};
    snprintf(channel->call.name, sizeof channel->call.name, "%s", call->name);
    channel->first_round = true;
}

/* Hardware would hang, or compute nonsense, when ranks call different collectives; here they are told. */
static int compare_calls(struct fake_hccl_channel *channel)
{
    for (unsigned rank = 0; rank < channel->ranks; rank++) {
        const struct shared_call *theirs = &channel->segment->rank[rank].call;
        if (memcmp(theirs, &channel->call, sizeof *theirs) != 0) {
            char what[240];
            snprintf(what, sizeof what,
                     "this rank has type %d, operation %d, root %d, count %lu, but rank %u is in %s with type %d, "
                     "operation %d, "
                     "root %d, count %lu",
                     channel->call.type, channel->call.operation, channel->call.root,
                     (unsigned long)channel->call.count, rank, theirs->name, theirs->type, theirs->operation,
                     theirs->root, (unsigned long)theirs->count);
            return break_channel(channel, HCCL_E_PARA, what);
        }
    }
    return HCCL_SUCCESS;
}

int fake_hccl_round_open(struct fake_hccl_channel *channel)
{
    if (fake_hccl_channel_state(channel) != HCCL_SUCCESS) {
        return broken_by_other(channel);
    }
    int error = HCCL_SUCCESS;
    for (unsigned rank = 0; rank < channel->ranks && error == HCCL_SUCCESS; rank++) {
        error = await_word(channel, rank, &channel->segment->rank[rank].released, channel->round, execution_timeout());
    }
    if (error == HCCL_SUCCESS && channel->first_round) {
        channel->segment->rank[channel->rank].call = channel->call;
    }
    return error;
}

int fake_hccl_round_show(struct fake_hccl_channel *channel)
{
    channel->round++;
    raise_word(&channel->segment->rank[channel->rank].shown, channel->round);
    int error = HCCL_SUCCESS;
    for (unsigned rank = 0; rank < channel->ranks && error == HCCL_SUCCESS; rank++) {
        error = await_word(channel, rank, &channel->segment->rank[rank].shown, channel->round, execution_timeout());
    }
    if (error == HCCL_SUCCESS && channel->first_round) {
        channel->first_round = false;
        error = compare_calls(channel);
    }
    return error;
}

void fake_hccl_round_close(struct fake_hccl_channel *channel)
{
    raise_word(&channel->segment->rank[channel->rank].released, channel->round);
}

/* ---- messages ---- */

static int write_all(int file, const char *data, size_t bytes, uint64_t offset)
{
    while (bytes > 0) {
        ssize_t done = pwrite(file, data, bytes, (off_t)offset);
        if (done < 0 && errno == EINTR) {
            continue;
        }
        if (done <= 0) {
            return -1;
        }
        data += done;
        bytes -= (size_t)done;
        offset += (size_t)done;
    }
    return 0;
}

static int read_all(int file, char *data, size_t bytes, uint64_t offset)
{
    while (bytes > 0) {
        ssize_t done = pread(file, data, bytes, (off_t)offset);
        if (done < 0 && errno == EINTR) {
            continue;
        }
        if (done <= 0) {
            return -1;
        }
        data += done;
        bytes -= (size_t)done;
        offset += (size_t)done;
    }
    return 0;
}

int fake_hccl_message_send(struct fake_hccl_channel *channel, unsigned to, const void *data, size_t bytes)
{
    struct segment *segment = channel->segment;
    if (fake_hccl_channel_state(channel) != HCCL_SUCCESS) {
        return broken_by_other(channel);
    }
    struct pipe *pipe = &segment->pipe[channel->rank][to];
    uint32_t written = pipe->written;
    int error = await_word(channel, to, &pipe->read, written + 1 - MESSAGES_AT_ONCE, execution_timeout());
    if (error != HCCL_SUCCESS) {
        return error;
    }
    uint64_t length = (bytes + PAGE - 1) / PAGE * PAGE;
    uint64_t offset = sizeof *segment + __atomic_fetch_add(&segment->next_offset, length, __ATOMIC_SEQ_CST);
    if (write_all(channel->file, data, bytes, offset) != 0) {
        return break_channel(channel, HCCL_E_MEMORY, "/dev/shm has no room for the message");
    }
    pipe->messages[written % MESSAGES_AT_ONCE] = (struct message){offset, bytes};
    raise_word(&pipe->written, written + 1);
    return HCCL_SUCCESS;
}

int fake_hccl_message_receive(struct fake_hccl_channel *channel, unsigned from, void *data, size_t bytes)
{
    if (fake_hccl_channel_state(channel) != HCCL_SUCCESS) {
        return broken_by_other(channel);
    }
    struct pipe *pipe = &channel->segment->pipe[from][channel->rank];
    uint32_t read = pipe->read;
    int error = await_word(channel, from, &pipe->written, read + 1, execution_timeout());
    if (error != HCCL_SUCCESS) {
        return error;
    }
    struct message message = pipe->messages[read % MESSAGES_AT_ONCE];
    if (message.bytes != bytes) {
        char what[160];
        snprintf(what, sizeof what, "rank %u sent %lu bytes, and %zu are to be received", from,
                 (unsigned long)message.bytes, bytes);
        return break_channel(channel, HCCL_E_PARA, what);
    }
    if (read_all(channel->file, data, bytes, message.offset) != 0) {
        return break_channel(channel, HCCL_E_SYSCALL, strerror(errno));
    }
    if (bytes > 0) {
        fallocate(channel->file, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)message.offset,
                  (off_t)((bytes + PAGE - 1) / PAGE * PAGE));
    }
    raise_word(&pipe->read, read + 1);
    return HCCL_SUCCESS;
}
