/*
 * fake_cann: a stand-in for the CANN runtime on host memory, so that the published torch-npu runs on a machine without
 * an Ascend NPU.  It has the C entry points that torch-npu 2.7.1 to 2.14 link or look up; no operator (aclnn) is in it.
 *
 * Sources, and what they stand in for.  All are compiled into one library,
 *     gcc -O2 -shared -fPIC -Wall -Wextra -Werror -Wl,-soname,libascendcl.so -o libascendcl.so *.c -lpthread
 * and the other libraries that torch-npu names (hccl, acl_op_compiler, ge_runner, graph, acl_tdt_channel, runtime,
 * opapi) are empty ones that link to it.
 *
 *     device.c            libascendcl: initialisation, devices, contexts, SoC and version queries, errors
 *     memory.c            libascendcl: device and host memory, virtual memory, copies
 *     hbm_ledger.c        (of ours)    how much of each device's memory all processes of this machine hold
 *     stream.c            libascendcl: streams, events, callbacks; the queues of FAKE_CANN_ASYNC
 *     legacy_operators.c  libacl_op_compiler, libruntime: operator descriptors; nearly all execution is refused
 *     profiling.c         libascendcl, libruntime: profiling (nothing is recorded)
 *     hccl.c              libhccl: communicators and collectives
 *     hccl_channel.c      (of ours)    the shared memory between the ranks of one communicator
 *     hccl_reduce.c       (of ours)    element types and reductions
 *
 * Environment:
 *     FAKE_CANN_DEVICES    number of devices, 1 to 16 (1)
 *     FAKE_CANN_HBM_MB     memory of each device in MiB (65536)
 *     FAKE_CANN_SOC        what aclrtGetSocName answers (Ascend910B2)
 *     FAKE_CANN_VERSION    the CANN version that is claimed (8.5.0)
 *     FAKE_CANN_TRACE      1: print each entry point that is called; 2: CANN's own log lines too
 *     FAKE_CANN_ASYNC      1: delay asynchronous work until something waits for it; see stream.c
 *     FAKE_CANN_TIMEOUT_S  how long a rank waits for the others in a collective (60); HCCL_EXEC_TIMEOUT goes before it
 *     FAKE_CANN_RUN        any word: processes with different words do not see each other's device memory
 *     ASCEND_RT_VISIBLE_DEVICES  as on hardware: "3,1" makes device 3 the first one and device 1 the second
 *
 * An entry point that is not here is missing from the library: torch-npu then names it, either at import ("undefined
 * symbol: ...") or when it looks it up.  One that is here but cannot do its work calls fake_cann_refuse.  Neither
 * answers success.
 */
#ifndef FAKE_CANN_H
#define FAKE_CANN_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Error codes: acl_base_rt.h of CANN 8.5, as shipped in torch-npu's include folder. */
enum {
    ACL_SUCCESS = 0,
    ACL_ERROR_INVALID_PARAM = 100000,
    ACL_ERROR_RT_PARAM_INVALID = 107000,
    ACL_ERROR_RT_INVALID_DEVICEID = 107001,
    ACL_ERROR_RT_CONTEXT_NULL = 107002,
    ACL_ERROR_RT_FEATURE_NOT_SUPPORT = 207000,
    ACL_ERROR_RT_MEMORY_ALLOCATION = 207001,
    ACL_ERROR_RT_FAILURE = 500003,
};

/* aclrtMemcpyKind */
enum {
    ACL_MEMCPY_HOST_TO_HOST = 0,
    ACL_MEMCPY_HOST_TO_DEVICE = 1,
    ACL_MEMCPY_DEVICE_TO_HOST = 2,
    ACL_MEMCPY_DEVICE_TO_DEVICE = 3,
    ACL_MEMCPY_DEFAULT = 4,
};

#define FAKE_CANN_MAX_DEVICES 16
#define FAKE_CANN_API __attribute__((visibility("default")))

/* ---- for other libraries of the emulator ------------------------------------------------------------------------- */

/* 1 when FAKE_CANN_ASYNC=1: work that is put on a stream is delayed.  0: everything is done when it is called. */
FAKE_CANN_API int fake_cann_async(void);

/*
 * Puts run(argument) on `stream` (an aclrtStream; NULL is the current device's default stream), behind what is already
 * there.  It runs exactly once, in the thread that makes the stream go on, without any lock held; at once when
 * fake_cann_async() is 0.  It stands for work of the device: what it writes must be device memory.
 * Returns 0, or 107000 for a stream that was destroyed.
 */
FAKE_CANN_API int fake_cann_stream_enqueue(void *stream, void (*run)(void *), void *argument);

/*
 * Runs what is on `stream`, in order, with what it waits for on other streams.  This is the device going on, not the
 * host waiting: results of asynchronous copies to the host stay hidden until the host synchronises.  Returns as above.
 */
FAKE_CANN_API int fake_cann_stream_drain(void *stream);

/* ---- between the files of this library --------------------------------------------------------------------------- */

/* Prints `function` and `why` as one line and keeps it for aclGetRecentErrMsg; returns
 * ACL_ERROR_RT_FEATURE_NOT_SUPPORT. */
int fake_cann_refuse(const char *function, const char *why);

/* Prints the function's name when FAKE_CANN_TRACE is set. */
void fake_cann_trace(const char *function);

/* Prints one sentence to stderr and keeps it for aclGetRecentErrMsg.  Returns `error`. */
int fake_cann_fail(int error, const char *format, ...) __attribute__((format(printf, 2, 3)));

long fake_cann_environment(const char *name, long value_if_unset);

/* Logical devices that this process sees, and the physical device behind one of them. */
int fake_cann_device_count(void);
int fake_cann_physical_device(int logical_device);

/* This thread's logical device; 0 before aclrtSetDevice (hardware answers 107002 there; this does not look that hard).
 */
int fake_cann_current_device(void);

size_t fake_cann_hbm_bytes(void);

/* Takes `bytes` of a physical device's memory for this process; false when all processes together would exceed it. */
bool fake_cann_hbm_take(int physical_device, size_t bytes);
void fake_cann_hbm_give_back(int physical_device, size_t bytes);
size_t fake_cann_hbm_used(int physical_device);

/*
 * Removes what killed processes left in /dev/shm, of this user and of this project's names.  A live owner holds flock
 * on its file, so a file whose lock can be had belongs to nobody.
 */
void fake_cann_remove_leftovers(void);

/* Creates /dev/shm/<prefix><suffix>, mode 0600, locked by this process; -1 and errno on failure. */
int fake_cann_create_shared(const char *name);

/* True when [address, address + bytes) is host memory that CANN pinned (aclrtMallocHost, aclrtHostRegister). */
bool fake_cann_is_pinned(const void *address, size_t bytes);
bool fake_cann_is_device_memory(const void *address);

/* stream.c: copies in stream order.  `kind` is one of the four definite kinds. */
int fake_cann_stream_copy(void *stream, void *to, const void *from, size_t bytes, int kind);
int fake_cann_stream_fill(void *stream, void *to, int value, size_t bytes);
/* Before memory is unmapped or freed: let every stream finish; `host_too` also makes host copies visible. */
void fake_cann_finish_all_streams(bool host_too);

#ifdef __cplusplus
}
#endif
#endif
