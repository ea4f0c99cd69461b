/*
 * Stands in for libascendcl's streams, events and callbacks.
 *
 * Without FAKE_CANN_ASYNC everything is done when it is called.  With FAKE_CANN_ASYNC=1 a stream is a queue of tasks
 * that stands still until something needs it to go on, so that code which forgets to wait sees what it may see on
 * hardware:
 *
 *   - host to device: the host memory is read when the task runs, not when it is submitted;
 *   - device to host: the host memory is filled with 0xFF (NaN) at once; the task takes a copy of the device memory
 * when it runs, and the host sees that copy only once it has waited for the stream, for the device, or for an event
 * behind it;
 *   - device to device, memset, launches, callbacks: when the task runs;
 *   - a wait for an event runs the other stream up to where the event was recorded;
 *   - a query answers "not ready" twice, and the third one finishes the work, so that polling ends.
 *
 * Host memory that CANN has not pinned is copied before the call returns (aclrtMemcpyAsync, CANN 8.5 documentation: "If
 * the host memory is non-page-locked memory, this API returns only after the memory copy task is complete").
 *
 * Leaves out: priorities, failure modes, captured graphs (aclmdlRI*), time-outs, more than one device running at a
 * time.
 */
#define _GNU_SOURCE
#include "fake_cann.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define POLLS_UNTIL_DONE 3
#define POISON 0xFF

/* A point in a stream's order: everything up to and with the task of this number. */
struct position {
    int stream; /* id */
    uint64_t number;
};

struct task {
    uint64_t number; /* 1, 2, ... in the order of submission */
    void (*run)(void *argument);
    void *argument;
    struct position awaited; /* number 0: waits for nothing */
    const char *host_source; /* host memory that the task will read */
    size_t host_source_bytes;
    struct task *next;
};

/* What the host may see once it has waited for the stream up to `number`. */
struct publication {
    uint64_t number;
    void *host; /* NULL: what `awaited` made visible */
    void *bytes;
    size_t count;
    struct position awaited;
    struct publication *next;
};

struct stream {
    int id;
    int device;
    uint32_t overflow_switch;
    bool destroyed;
    uint64_t submitted;
    uint64_t completed;
    unsigned polls;
    bool running; /* one thread runs a stream's tasks at a time */
    pthread_t runner;
    struct task *first;
    struct task *last;
    struct publication *published_first;
    struct publication *published_last;
    struct stream *next;
};

/* The moment of one record; the event and the queued task both hold it. */
struct moment {
    struct timespec time;
    int holders;
};

struct event {
    struct position recorded; /* number 0: never */
    unsigned polls;
    struct moment *moment;
};

int aclrtSynchronizeStream(void *handle);

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER; /* of all below */
static pthread_cond_t progress = PTHREAD_COND_INITIALIZER;
static struct stream *streams; /* destroyed ones stay, so that ids and late users are safe */
static struct stream *default_streams[FAKE_CANN_MAX_DEVICES];
static int last_stream_id;

int fake_cann_async(void)
{
    static int on = -1;
    if (on < 0) {
        on = fake_cann_environment("FAKE_CANN_ASYNC", 0) != 0;
    }
    return on;
}

/* ---- streams ---- */

static struct stream *new_stream(int device)
{
    struct stream *stream = calloc(1, sizeof *stream);
    if (stream == NULL) {
        return NULL;
    }
    stream->device = device;
    stream->id = ++last_stream_id;
    stream->next = streams;
    streams = stream;
    return stream;
}

static int create_stream(void **handle)
{
    pthread_mutex_lock(&lock);
    *handle = new_stream(fake_cann_current_device());
    pthread_mutex_unlock(&lock);
    return *handle != NULL ? ACL_SUCCESS : ACL_ERROR_RT_MEMORY_ALLOCATION;
}

/* With the lock held: the stream of a handle, NULL being the current device's default stream. */
static struct stream *stream_of(void *handle)
{
    if (handle != NULL) {
        return handle;
    }
    int device = fake_cann_current_device();
    if (default_streams[device] == NULL) {
        default_streams[device] = new_stream(device);
    }
    return default_streams[device];
}

static struct stream *stream_by_id(int id)
{
    struct stream *stream = streams;
    while (stream != NULL && stream->id != id) {
        stream = stream->next;
    }
    return stream;
}

/* ---- running tasks ---- */

static void publish(struct stream *stream, uint64_t number);

static void append_publication(struct stream *stream, struct publication entry)
{
    struct publication *added = malloc(sizeof *added);
    if (added == NULL) {
        abort();
    }
    *added = entry;
    added->next = NULL;
    if (stream->published_last != NULL) {
        stream->published_last->next = added;
    } else {
        stream->published_first = added;
    }
    stream->published_last = added;
}

/*
 * With the lock held: runs the stream's tasks up to `number`.  The lock is let go while a task runs, because tasks run
 * code of others, which may call CANN.  A task that makes its own stream go on (it is running already) gets nothing
 * done.
 */
static void advance(struct stream *stream, uint64_t number)
{
    while (stream->completed < number) {
        if (stream->running) {
            if (pthread_equal(stream->runner, pthread_self())) {
                return;
            }
            pthread_cond_wait(&progress, &lock);
            continue;
        }
        struct task *task = stream->first;
        if (task == NULL) {
            return;
        }
        stream->running = true;
        stream->runner = pthread_self();
        if (task->awaited.number != 0) {
            struct stream *other = stream_by_id(task->awaited.stream);
            advance(other, task->awaited.number);
            append_publication(stream, (struct publication){.number = task->number, .awaited = task->awaited});
        } else {
            if (task->host_source != NULL) {
                publish(stream, task->number); /* it may read what an earlier copy of this stream wrote */
            }
            pthread_mutex_unlock(&lock);
            task->run(task->argument);
            pthread_mutex_lock(&lock);
        }
        stream->first = task->next;
        if (stream->first == NULL) {
            stream->last = NULL;
        }
        stream->completed = task->number;
        stream->running = false;
        pthread_cond_broadcast(&progress);
        free(task);
    }
}

/* With the lock held: shows the host everything that the stream has done up to `number`. */
static void publish(struct stream *stream, uint64_t number)
{
    while (stream->published_first != NULL && stream->published_first->number <= number) {
        struct publication *entry = stream->published_first;
        stream->published_first = entry->next;
        if (stream->published_first == NULL) {
            stream->published_last = NULL;
        }
        if (entry->host != NULL) {
            memcpy(entry->host, entry->bytes, entry->count);
            free(entry->bytes);
        } else {
            publish(stream_by_id(entry->awaited.stream), entry->awaited.number);
        }
        free(entry);
    }
}

/* With the lock held: the host waits for the stream. */
static void synchronise(struct stream *stream, uint64_t number)
{
    advance(stream, number);
    publish(stream, number);
    stream->polls = 0;
}

static void no_work(void *argument)
{
    (void)argument;
}

/* With the lock held: puts a task on the stream; its number. */
static uint64_t submit(struct stream *stream, struct task entry)
{
    struct task *task = malloc(sizeof *task);
    if (task == NULL) {
        abort();
    }
    *task = entry;
    task->number = ++stream->submitted;
    task->next = NULL;
    if (stream->last != NULL) {
        stream->last->next = task;
    } else {
        stream->first = task;
    }
    stream->last = task;
    stream->polls = 0;
    return task->number;
}

static int use_after_destroy(const char *function)
{
    return fake_cann_fail(ACL_ERROR_RT_PARAM_INVALID, "%s: the stream was destroyed", function);
}

static int enqueue(const char *function, void *handle, struct task task)
{
    pthread_mutex_lock(&lock);
    struct stream *stream = stream_of(handle);
    if (stream->destroyed) {
        pthread_mutex_unlock(&lock);
        return use_after_destroy(function);
    }
    uint64_t number = submit(stream, task);
    if (!fake_cann_async()) {
        synchronise(stream, number);
    }
    pthread_mutex_unlock(&lock);
    return ACL_SUCCESS;
}

int fake_cann_stream_enqueue(void *handle, void (*run)(void *), void *argument)
{
    return enqueue(__func__, handle, (struct task){.run = run, .argument = argument});
}

int fake_cann_stream_drain(void *handle)
{
    if (!fake_cann_async()) {
        return ACL_SUCCESS;
    }
    pthread_mutex_lock(&lock);
    struct stream *stream = stream_of(handle);
    bool destroyed = stream->destroyed;
    if (!destroyed) {
        advance(stream, stream->submitted);
    }
    pthread_mutex_unlock(&lock);
    return destroyed ? use_after_destroy(__func__) : ACL_SUCCESS;
}

void fake_cann_finish_all_streams(bool host_too)
{
    if (!fake_cann_async()) {
        return;
    }
    pthread_mutex_lock(&lock);
    for (struct stream *stream = streams; stream != NULL; stream = stream->next) {
        advance(stream, stream->submitted);
        if (host_too) {
            publish(stream, stream->completed);
        }
    }
    pthread_mutex_unlock(&lock);
}

/* ---- copies ---- */

struct copy {
    void *to;
    const void *from;
    size_t bytes;
    int fill; /* when from is NULL */
    struct stream *stream;
    bool to_host;
};

static void run_copy(void *argument)
{
    struct copy *copy = argument;
    if (copy->to_host) {
        void *taken = malloc(copy->bytes);
        if (taken == NULL) {
            abort();
        }
        memcpy(taken, copy->from, copy->bytes);
        pthread_mutex_lock(&lock);
        struct publication entry = {
            .number = copy->stream->completed + 1, .host = copy->to, .bytes = taken, .count = copy->bytes};
        append_publication(copy->stream, entry);
        pthread_mutex_unlock(&lock);
    } else if (copy->from != NULL) {
        memmove(copy->to, copy->from, copy->bytes);
    } else {
        memset(copy->to, copy->fill, copy->bytes);
    }
    free(copy);
}

/* With the lock held: runs what still has to read this host memory, before it is overwritten with poison. */
static void run_readers_of(const char *host, size_t bytes)
{
    for (struct stream *stream = streams; stream != NULL; stream = stream->next) {
        uint64_t last_reader = 0;
        for (struct task *task = stream->first; task != NULL; task = task->next) {
            bool overlaps = task->host_source < host + bytes && host < task->host_source + task->host_source_bytes;
            if (task->host_source != NULL && overlaps) {
                last_reader = task->number;
            }
        }
        advance(stream, last_reader);
    }
}

static int submit_copy(void *handle, struct copy entry, const char *host_source)
{
    pthread_mutex_lock(&lock);
    struct stream *stream = stream_of(handle);
    if (stream->destroyed) {
        pthread_mutex_unlock(&lock);
        return use_after_destroy("aclrtMemcpyAsync");
    }
    struct copy *copy = malloc(sizeof *copy);
    if (copy == NULL) {
        abort();
    }
    *copy = entry;
    copy->stream = stream;
    if (copy->to_host) {
        run_readers_of(copy->to, copy->bytes);
        memset(copy->to, POISON, copy->bytes);
    }
    struct task task = {.run = run_copy, .argument = copy, .host_source = host_source};
    task.host_source_bytes = host_source != NULL ? copy->bytes : 0;
    submit(stream, task);
    pthread_mutex_unlock(&lock);
    return ACL_SUCCESS;
}

/* A copy from or to host memory that is not pinned: behind the stream's earlier work, and finished on return. */
static int copy_now(void *handle, void *to, const void *from, size_t bytes)
{
    int error = aclrtSynchronizeStream(handle);
    if (error == ACL_SUCCESS) {
        memmove(to, from, bytes);
    }
    return error;
}

int fake_cann_stream_copy(void *handle, void *to, const void *from, size_t bytes, int kind)
{
    if (kind == ACL_MEMCPY_HOST_TO_HOST) {
        return fake_cann_refuse("aclrtMemcpyAsync", "CANN copies nothing from host to host asynchronously");
    }
    if (!fake_cann_async() || bytes == 0) {
        memmove(to, from, bytes);
        return ACL_SUCCESS;
    }
    bool from_host = kind == ACL_MEMCPY_HOST_TO_DEVICE;
    bool to_host = kind == ACL_MEMCPY_DEVICE_TO_HOST;
    const void *host = from_host ? from : to;
    if ((from_host || to_host) && !fake_cann_is_pinned(host, bytes)) {
        return copy_now(handle, to, from, bytes);
    }
    struct copy copy = {.to = to, .from = from, .bytes = bytes, .to_host = to_host};
    return submit_copy(handle, copy, from_host ? from : NULL);
}

int fake_cann_stream_fill(void *handle, void *to, int value, size_t bytes)
{
    if (!fake_cann_async() || bytes == 0) {
        memset(to, value, bytes);
        return ACL_SUCCESS;
    }
    struct copy copy = {.to = to, .bytes = bytes, .fill = value};
    return submit_copy(handle, copy, NULL);
}

/* ---- stream calls ---- */

FAKE_CANN_API int aclrtCreateStream(void **stream)
{
    fake_cann_trace(__func__);
    return create_stream(stream);
}

FAKE_CANN_API int aclrtCreateStreamWithConfig(void **stream, uint32_t priority, uint32_t flags)
{
    (void)priority;
    (void)flags;
    fake_cann_trace(__func__);
    return create_stream(stream);
}

static int destroy_stream(void *handle)
{
    if (handle == NULL) {
        return ACL_ERROR_RT_PARAM_INVALID;
    }
    pthread_mutex_lock(&lock);
    struct stream *stream = handle;
    synchronise(stream, stream->submitted);
    stream->destroyed = true;
    pthread_mutex_unlock(&lock);
    return ACL_SUCCESS;
}

FAKE_CANN_API int aclrtDestroyStream(void *stream)
{
    fake_cann_trace(__func__);
    return destroy_stream(stream);
}

FAKE_CANN_API int aclrtDestroyStreamForce(void *stream)
{
    fake_cann_trace(__func__);
    return destroy_stream(stream);
}

FAKE_CANN_API int aclrtSynchronizeStream(void *handle)
{
    fake_cann_trace(__func__);
    pthread_mutex_lock(&lock);
    struct stream *stream = stream_of(handle);
    bool destroyed = stream->destroyed;
    synchronise(stream, stream->submitted);
    pthread_mutex_unlock(&lock);
    return destroyed ? use_after_destroy(__func__) : ACL_SUCCESS;
}

FAKE_CANN_API int aclrtSynchronizeStreamWithTimeout(void *stream, int32_t milliseconds)
{
    (void)milliseconds;
    return aclrtSynchronizeStream(stream);
}

FAKE_CANN_API int aclrtSynchronizeDevice(void)
{
    fake_cann_trace(__func__);
    int device = fake_cann_current_device();
    pthread_mutex_lock(&lock);
    for (struct stream *stream = streams; stream != NULL; stream = stream->next) {
        if (stream->device == device) {
            synchronise(stream, stream->submitted);
        }
    }
    pthread_mutex_unlock(&lock);
    return ACL_SUCCESS;
}

FAKE_CANN_API int aclrtSynchronizeDeviceWithTimeout(int32_t milliseconds)
{
    (void)milliseconds;
    return aclrtSynchronizeDevice();
}

/* With the lock held: whether a poll finds everything up to `number` done. */
static bool poll(struct stream *stream, uint64_t number, unsigned *polls)
{
    if (stream->completed < number && ++*polls < POLLS_UNTIL_DONE) {
        return false;
    }
    *polls = 0;
    synchronise(stream, number);
    return true;
}

FAKE_CANN_API int aclrtStreamQuery(void *handle, int *status)
{
    fake_cann_trace(__func__);
    pthread_mutex_lock(&lock);
    struct stream *stream = stream_of(handle);
    bool done = poll(stream, stream->submitted, &stream->polls);
    pthread_mutex_unlock(&lock);
    *status = done ? 0 : 1; /* ACL_STREAM_STATUS_COMPLETE, _NOT_READY */
    return ACL_SUCCESS;
}

FAKE_CANN_API int aclrtStreamGetId(void *handle, int32_t *id)
{
    pthread_mutex_lock(&lock);
    *id = stream_of(handle)->id;
    pthread_mutex_unlock(&lock);
    return ACL_SUCCESS;
}

FAKE_CANN_API int aclrtSetStreamFailureMode(void *stream, uint64_t mode)
{
    (void)stream;
    (void)mode;
    return ACL_SUCCESS;
}

FAKE_CANN_API int aclrtSetStreamAttribute(void *stream, int attribute, void *value)
{
    (void)stream;
    (void)attribute;
    (void)value;
    return ACL_SUCCESS;
}

FAKE_CANN_API int aclrtSetStreamOverflowSwitch(void *handle, uint32_t flag)
{
    pthread_mutex_lock(&lock);
    stream_of(handle)->overflow_switch = flag;
    pthread_mutex_unlock(&lock);
    return ACL_SUCCESS;
}

FAKE_CANN_API int aclrtGetStreamOverflowSwitch(void *handle, uint32_t *flag)
{
    pthread_mutex_lock(&lock);
    *flag = stream_of(handle)->overflow_switch;
    pthread_mutex_unlock(&lock);
    return ACL_SUCCESS;
}

/* ---- events ---- */

static void let_go(struct moment *moment)
{
    if (moment != NULL && __atomic_sub_fetch(&moment->holders, 1, __ATOMIC_ACQ_REL) == 0) {
        free(moment);
    }
}

static void run_record(void *argument)
{
    struct moment *moment = argument;
    clock_gettime(CLOCK_MONOTONIC, &moment->time);
    let_go(moment);
}

FAKE_CANN_API int aclrtCreateEventExWithFlag(void **event, uint32_t flags)
{
    (void)flags;
    fake_cann_trace(__func__);
    *event = calloc(1, sizeof(struct event));
    return *event != NULL ? ACL_SUCCESS : ACL_ERROR_RT_MEMORY_ALLOCATION;
}

FAKE_CANN_API int aclrtCreateEventWithFlag(void **event, uint32_t flags)
{
    return aclrtCreateEventExWithFlag(event, flags);
}

FAKE_CANN_API int aclrtCreateEvent(void **event)
{
    return aclrtCreateEventExWithFlag(event, 0);
}

FAKE_CANN_API int aclrtDestroyEvent(void *handle)
{
    fake_cann_trace(__func__);
    struct event *event = handle;
    let_go(event->moment);
    free(event);
    return ACL_SUCCESS;
}

FAKE_CANN_API int aclrtRecordEvent(void *handle, void *stream_handle)
{
    fake_cann_trace(__func__);
    struct event *event = handle;
    struct moment *moment = calloc(1, sizeof *moment);
    if (moment == NULL) {
        return ACL_ERROR_RT_MEMORY_ALLOCATION;
    }
    moment->holders = 2;
    pthread_mutex_lock(&lock);
    struct stream *stream = stream_of(stream_handle);
    if (stream->destroyed) {
        pthread_mutex_unlock(&lock);
        free(moment);
        return use_after_destroy(__func__);
    }
    uint64_t number = submit(stream, (struct task){.run = run_record, .argument = moment});
    let_go(event->moment);
    *event = (struct event){.recorded = {stream->id, number}, .moment = moment};
    if (!fake_cann_async()) {
        synchronise(stream, number);
    }
    pthread_mutex_unlock(&lock);
    return ACL_SUCCESS;
}

FAKE_CANN_API int aclrtResetEvent(void *handle, void *stream)
{
    (void)stream;
    struct event *event = handle;
    pthread_mutex_lock(&lock);
    let_go(event->moment);
    *event = (struct event){0};
    pthread_mutex_unlock(&lock);
    return ACL_SUCCESS;
}

FAKE_CANN_API int aclrtStreamWaitEvent(void *stream, void *handle)
{
    fake_cann_trace(__func__);
    struct event *event = handle;
    pthread_mutex_lock(&lock);
    struct position recorded = event->recorded;
    pthread_mutex_unlock(&lock);
    if (recorded.number == 0) {
        return ACL_SUCCESS; /* never recorded: nothing to wait for */
    }
    return enqueue(__func__, stream, (struct task){.run = no_work, .awaited = recorded});
}

FAKE_CANN_API int aclrtSynchronizeEvent(void *handle)
{
    fake_cann_trace(__func__);
    struct event *event = handle;
    pthread_mutex_lock(&lock);
    if (event->recorded.number != 0) {
        synchronise(stream_by_id(event->recorded.stream), event->recorded.number);
    }
    pthread_mutex_unlock(&lock);
    return ACL_SUCCESS;
}

FAKE_CANN_API int aclrtQueryEventStatus(void *handle, int *status)
{
    fake_cann_trace(__func__);
    struct event *event = handle;
    pthread_mutex_lock(&lock);
    bool done =
        true; /* an event that was never recorded counts as complete (aclrtRecordEvent, CANN 8.5 documentation) */
    if (event->recorded.number != 0) {
        done = poll(stream_by_id(event->recorded.stream), event->recorded.number, &event->polls);
    }
    pthread_mutex_unlock(&lock);
    *status = done ? 1 : 0; /* ACL_EVENT_RECORDED_STATUS_COMPLETE, _NOT_READY */
    return ACL_SUCCESS;
}

FAKE_CANN_API int aclrtQueryEventWaitStatus(void *event, int *status)
{
    int recorded = 0;
    int error = aclrtQueryEventStatus(event, &recorded);
    *status = recorded ? 0 : 1; /* ACL_EVENT_WAIT_STATUS_COMPLETE, _NOT_READY */
    return error;
}

FAKE_CANN_API int aclrtEventElapsedTime(float *milliseconds, void *start, void *end)
{
    struct event *first = start;
    struct event *second = end;
    if (first->moment == NULL || second->moment == NULL) {
        return ACL_ERROR_RT_PARAM_INVALID;
    }
    aclrtSynchronizeEvent(start);
    aclrtSynchronizeEvent(end);
    double seconds = (double)(second->moment->time.tv_sec - first->moment->time.tv_sec);
    double nanoseconds = (double)(second->moment->time.tv_nsec - first->moment->time.tv_nsec);
    *milliseconds = (float)(seconds * 1e3 + nanoseconds * 1e-6);
    return ACL_SUCCESS;
}

/* ---- callbacks ---- */

/* A callback runs on the host behind the stream's earlier work, so it sees what that copied to the host. */
static int enqueue_callback(const char *function, void *stream, void (*run)(void *), void *argument)
{
    static const char any_host_memory[1];
    struct task task = {.run = run, .argument = argument, .host_source = any_host_memory};
    return enqueue(function, stream, task);
}

FAKE_CANN_API int aclrtLaunchCallback(void (*run)(void *), void *argument, int blocks, void *stream)
{
    (void)blocks;
    return enqueue_callback(__func__, stream, run, argument);
}

FAKE_CANN_API int aclrtLaunchHostFunc(void *stream, void (*run)(void *), void *argument)
{
    return enqueue_callback(__func__, stream, run, argument);
}

/* Callbacks run in the thread that makes the stream go on, not in the subscribed one. */
FAKE_CANN_API int aclrtSubscribeReport(uint64_t thread, void *stream)
{
    (void)thread;
    (void)stream;
    return ACL_SUCCESS;
}

FAKE_CANN_API int aclrtUnSubscribeReport(uint64_t thread, void *stream)
{
    (void)thread;
    (void)stream;
    return ACL_SUCCESS;
}

FAKE_CANN_API int aclrtProcessReport(int32_t milliseconds)
{
    usleep(milliseconds > 0 ? (useconds_t)milliseconds * 1000 : 1000);
    return ACL_SUCCESS;
}
