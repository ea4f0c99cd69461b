/*
 * Stands in for libascendcl's memory calls: device memory is anonymous host memory, zero when new, charged to the
 * device; virtual memory is an address range on which memfd files are mapped, so that unmapping and freeing really
 * gives pages back. Leaves out: huge pages, memory policies, sharing of memory between processes (refused), and any
 * check that a device address is not read by the host.
 */
#define _GNU_SOURCE
#include "fake_cann.h"

#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define PAGE 4096
#define GRANULARITY ((size_t)2 << 20) /* of aclrtMallocPhysical on Atlas A2: 2 MiB */

/* ---- which addresses are what ---- */

struct region {
    char *start;
    size_t bytes;
    int device; /* physical */
};

/* Sorted by start; regions of one table do not overlap. */
struct region_table {
    struct region *regions;
    size_t count;
    size_t room;
};

static pthread_mutex_t tables_lock = PTHREAD_MUTEX_INITIALIZER;
static struct region_table allocated;  /* aclrtMalloc */
static struct region_table reserved;   /* aclrtReserveMemAddress */
static struct region_table mapped;     /* aclrtMapMem */
static struct region_table pinned;     /* aclrtMallocHost */
static struct region_table registered; /* aclrtHostRegister */

/* Index of the first region that starts behind `address`. */
static size_t first_behind(const struct region_table *table, const char *address)
{
    size_t low = 0;
    size_t high = table->count;
    while (low < high) {
        size_t middle = (low + high) / 2;
        if (table->regions[middle].start <= address) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    return low;
}

static bool remember(struct region_table *table, void *start, size_t bytes, int device)
{
    pthread_mutex_lock(&tables_lock);
    if (table->count == table->room) {
        size_t room = table->room == 0 ? 64 : 2 * table->room;
        struct region *grown = realloc(table->regions, room * sizeof *grown);
        if (grown == NULL) {
            pthread_mutex_unlock(&tables_lock);
            return false;
        }
        table->regions = grown;
        table->room = room;
    }
    size_t place = first_behind(table, start);
    memmove(table->regions + place + 1, table->regions + place, (table->count - place) * sizeof *table->regions);
    table->regions[place] = (struct region){start, bytes, device};
    table->count++;
    pthread_mutex_unlock(&tables_lock);
    return true;
}

/* Removes the region that starts exactly at `start`; false when there is none. */
static bool forget(struct region_table *table, const void *start, struct region *found)
{
    pthread_mutex_lock(&tables_lock);
    size_t place = first_behind(table, start);
    bool known = place > 0 && table->regions[place - 1].start == start;
    if (known) {
        *found = table->regions[place - 1];
        memmove(table->regions + place - 1, table->regions + place, (table->count - place) * sizeof *table->regions);
        table->count--;
    }
    pthread_mutex_unlock(&tables_lock);
    return known;
}

static bool contains(const struct region_table *table, const char *address, size_t bytes)
{
    pthread_mutex_lock(&tables_lock);
    size_t place = first_behind(table, address);
    bool inside = false;
    if (place > 0) {
        const struct region *region = &table->regions[place - 1];
        inside = address + bytes <= region->start + region->bytes;
    }
    pthread_mutex_unlock(&tables_lock);
    return inside;
}

bool fake_cann_is_pinned(const void *address, size_t bytes)
{
    return contains(&pinned, address, bytes) || contains(&registered, address, bytes);
}

bool fake_cann_is_device_memory(const void *address)
{
    return contains(&allocated, address, 1) || contains(&mapped, address, 1);
}

static size_t round_up(size_t bytes, size_t unit)
{
    return (bytes + unit - 1) / unit * unit;
}

static int current_physical_device(void)
{
    return fake_cann_physical_device(fake_cann_current_device());
}

/* ---- device memory ---- */

static int out_of_memory(const char *function, int device, size_t bytes)
{
    size_t total = fake_cann_hbm_bytes();
    size_t used = fake_cann_hbm_used(device);
    return fake_cann_fail(ACL_ERROR_RT_MEMORY_ALLOCATION,
                          "%s: device %d is out of memory: %zu MiB wanted, %zu of %zu MiB in use", function, device,
                          bytes >> 20, used >> 20, total >> 20);
}

static int allocate(const char *function, void **address, size_t bytes)
{
    fake_cann_trace(function);
    if (address == NULL || bytes == 0) {
        return ACL_ERROR_RT_PARAM_INVALID;
    }
    int device = current_physical_device();
    size_t charged = round_up(bytes, PAGE);
    *address = NULL;
    if (charged < bytes || !fake_cann_hbm_take(device, charged)) {
        return out_of_memory(function, device, bytes);
    }
    void *start = mmap(NULL, charged, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (start == MAP_FAILED || !remember(&allocated, start, charged, device)) {
        fake_cann_hbm_give_back(device, charged);
        return fake_cann_fail(ACL_ERROR_RT_MEMORY_ALLOCATION, "%s: the host has no memory: %s", function,
                              strerror(errno));
    }
    *address = start;
    return ACL_SUCCESS;
}

FAKE_CANN_API int aclrtMalloc(void **address, size_t bytes, int policy)
{
    (void)policy;
    return allocate(__func__, address, bytes);
}

FAKE_CANN_API int aclrtMallocAlign32(void **address, size_t bytes, int policy)
{
    (void)policy;
    return allocate(__func__, address, bytes);
}

FAKE_CANN_API int aclrtMallocWithCfg(void **address, size_t bytes, int policy, void *config)
{
    (void)policy;
    (void)config;
    return allocate(__func__, address, bytes);
}

FAKE_CANN_API int aclrtFree(void *address)
{
    fake_cann_trace(__func__);
    fake_cann_finish_all_streams(false);
    struct region region;
    if (!forget(&allocated, address, &region)) {
        return fake_cann_fail(ACL_ERROR_RT_PARAM_INVALID, "aclrtFree: %p is not the start of device memory", address);
    }
    munmap(region.start, region.bytes);
    fake_cann_hbm_give_back(region.device, region.bytes);
    return ACL_SUCCESS;
}

FAKE_CANN_API int aclrtGetMemInfo(int kind, size_t *free_bytes, size_t *total_bytes)
{
    (void)kind; /* one kind of memory per device */
    size_t total = fake_cann_hbm_bytes();
    size_t used = fake_cann_hbm_used(current_physical_device());
    *total_bytes = total;
    *free_bytes = used < total ? total - used : 0;
    return ACL_SUCCESS;
}

/* ---- pinned host memory ---- */

static int allocate_host(const char *function, void **address, size_t bytes)
{
    fake_cann_trace(function);
    if (bytes == 0) {
        return ACL_ERROR_RT_PARAM_INVALID;
    }
    if (posix_memalign(address, PAGE, bytes) != 0 || !remember(&pinned, *address, bytes, 0)) {
        return ACL_ERROR_RT_MEMORY_ALLOCATION;
    }
    return ACL_SUCCESS;
}

FAKE_CANN_API int aclrtMallocHost(void **address, size_t bytes)
{
    return allocate_host(__func__, address, bytes);
}

FAKE_CANN_API int aclrtMallocHostWithCfg(void **address, uint64_t bytes, void *config)
{
    (void)config;
    return allocate_host(__func__, address, bytes);
}

FAKE_CANN_API int aclrtFreeHost(void *address)
{
    fake_cann_trace(__func__);
    fake_cann_finish_all_streams(true);
    struct region region;
    if (!forget(&pinned, address, &region)) {
        return fake_cann_fail(ACL_ERROR_RT_PARAM_INVALID, "aclrtFreeHost: %p is not the start of pinned memory",
                              address);
    }
    free(address);
    return ACL_SUCCESS;
}

FAKE_CANN_API int aclrtHostRegister(void *address, uint64_t bytes, int kind, void **device_address)
{
    (void)kind;
    *device_address = address;
    return remember(&registered, address, bytes, 0) ? ACL_SUCCESS : ACL_ERROR_RT_MEMORY_ALLOCATION;
}

FAKE_CANN_API int aclrtHostUnregister(void *address)
{
    fake_cann_finish_all_streams(true);
    struct region region;
    return forget(&registered, address, &region) ? ACL_SUCCESS : ACL_ERROR_RT_PARAM_INVALID;
}

/* ---- copies ---- */

/* The direction of ACL_MEMCPY_DEFAULT, from the addresses. */
static int definite_kind(int kind, const void *to, const void *from)
{
    if (kind != ACL_MEMCPY_DEFAULT) {
        return kind;
    }
    bool to_device = fake_cann_is_device_memory(to);
    bool from_device = fake_cann_is_device_memory(from);
    return (from_device ? 2 : 0) + (to_device ? 1 : 0);
}

/* Blocks, but waits for no stream: torch-npu synchronises the stream itself before it calls this. */
FAKE_CANN_API int aclrtMemcpy(void *to, size_t room, const void *from, size_t bytes, int kind)
{
    fake_cann_trace(__func__);
    (void)kind;
    if (bytes > room) {
        return ACL_ERROR_RT_PARAM_INVALID;
    }
    memmove(to, from, bytes);
    return ACL_SUCCESS;
}

FAKE_CANN_API int aclrtMemcpyAsync(void *to, size_t room, const void *from, size_t bytes, int kind, void *stream)
{
    fake_cann_trace(__func__);
    if (bytes > room) {
        return ACL_ERROR_RT_PARAM_INVALID;
    }
    return fake_cann_stream_copy(stream, to, from, bytes, definite_kind(kind, to, from));
}

FAKE_CANN_API int aclrtMemset(void *address, size_t room, int32_t value, size_t bytes)
{
    fake_cann_trace(__func__);
    if (bytes > room) {
        return ACL_ERROR_RT_PARAM_INVALID;
    }
    memset(address, value, bytes);
    return ACL_SUCCESS;
}

FAKE_CANN_API int aclrtMemsetAsync(void *address, size_t room, int32_t value, size_t bytes, void *stream)
{
    fake_cann_trace(__func__);
    if (bytes > room) {
        return ACL_ERROR_RT_PARAM_INVALID;
    }
    return fake_cann_stream_fill(stream, address, value, bytes);
}

/* ---- virtual memory ---- */

struct physical_memory { /* aclrtDrvMemHandle */
    int file;
    size_t bytes;
    int device; /* physical; -1: host memory, not charged */
};

struct physical_memory_property { /* aclrtPhysicalMemProp */
    int handle_type;
    int allocation_type;
    int memory_attribute;
    uint32_t location_id;
    int location_type; /* 0: host, 1: device */
    uint64_t reserved;
};

FAKE_CANN_API int aclrtMemGetAllocationGranularity(void *property, int option, size_t *granularity)
{
    (void)property;
    (void)option;
    *granularity = GRANULARITY;
    return ACL_SUCCESS;
}

FAKE_CANN_API int aclrtReserveMemAddress(void **address, size_t bytes, size_t alignment, void *wanted, uint64_t flags)
{
    (void)alignment;
    (void)wanted;
    (void)flags;
    fake_cann_trace(__func__);
    void *start = mmap(NULL, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (start == MAP_FAILED || !remember(&reserved, start, bytes, 0)) {
        return ACL_ERROR_RT_MEMORY_ALLOCATION;
    }
    *address = start;
    return ACL_SUCCESS;
}

FAKE_CANN_API int aclrtReleaseMemAddress(void *address)
{
    fake_cann_trace(__func__);
    struct region region;
    if (!forget(&reserved, address, &region)) {
        return fake_cann_fail(ACL_ERROR_RT_PARAM_INVALID, "aclrtReleaseMemAddress: %p was not reserved", address);
    }
    munmap(region.start, region.bytes);
    return ACL_SUCCESS;
}

static int location_of(const struct physical_memory_property *property)
{
    if (property == NULL) {
        return current_physical_device();
    }
    if (property->location_type != 1) {
        return -1;
    }
    return fake_cann_physical_device((int)property->location_id);
}

static void give_back_physical(int device, size_t bytes)
{
    if (device >= 0) {
        fake_cann_hbm_give_back(device, bytes);
    }
}

FAKE_CANN_API int aclrtMallocPhysical(void **handle, size_t bytes, const void *property, uint64_t flags)
{
    (void)flags;
    fake_cann_trace(__func__);
    int device = location_of(property);
    if (device >= 0 && !fake_cann_hbm_take(device, bytes)) {
        return out_of_memory(__func__, device, bytes);
    }
    struct physical_memory *memory = malloc(sizeof *memory);
    int file = memfd_create("fake_cann_hbm", MFD_CLOEXEC);
    if (memory == NULL || file < 0 || ftruncate(file, (off_t)bytes) != 0) {
        if (file >= 0) {
            close(file);
        }
        free(memory);
        give_back_physical(device, bytes);
        return fake_cann_fail(ACL_ERROR_RT_MEMORY_ALLOCATION, "%s: the host refuses: %s", __func__, strerror(errno));
    }
    *memory = (struct physical_memory){file, bytes, device};
    *handle = memory;
    return ACL_SUCCESS;
}

FAKE_CANN_API int aclrtFreePhysical(void *handle)
{
    fake_cann_trace(__func__);
    fake_cann_finish_all_streams(false);
    struct physical_memory *memory = handle;
    close(memory->file); /* its pages go when it is mapped nowhere any more */
    give_back_physical(memory->device, memory->bytes);
    free(memory);
    return ACL_SUCCESS;
}

FAKE_CANN_API int aclrtMapMem(void *address, size_t bytes, size_t offset, void *handle, uint64_t flags)
{
    (void)flags;
    fake_cann_trace(__func__);
    struct physical_memory *memory = handle;
    if (!contains(&reserved, address, bytes) || offset + bytes > memory->bytes) {
        return fake_cann_fail(ACL_ERROR_RT_PARAM_INVALID,
                              "aclrtMapMem: [%p, +%zu) is not reserved, or the memory is smaller", address, bytes);
    }
    if (contains(&mapped, address, 1)) {
        return fake_cann_fail(ACL_ERROR_RT_PARAM_INVALID, "aclrtMapMem: %p is mapped already", address);
    }
    void *start = mmap(address, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, memory->file, (off_t)offset);
    if (start != address || !remember(&mapped, address, bytes, memory->device)) {
        return ACL_ERROR_RT_FAILURE;
    }
    return ACL_SUCCESS;
}

FAKE_CANN_API int aclrtUnmapMem(void *address)
{
    fake_cann_trace(__func__);
    fake_cann_finish_all_streams(false);
    struct region region;
    if (!forget(&mapped, address, &region)) {
        return fake_cann_fail(ACL_ERROR_RT_PARAM_INVALID, "aclrtUnmapMem: nothing is mapped at %p", address);
    }
    void *start =
        mmap(address, region.bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
    return start == address ? ACL_SUCCESS : ACL_ERROR_RT_FAILURE;
}

/* ---- sharing between processes: not here ---- */

FAKE_CANN_API int aclrtMemExportToShareableHandle(void *handle, int kind, uint64_t flags, uint64_t *shared)
{
    (void)handle;
    (void)kind;
    (void)flags;
    (void)shared;
    return fake_cann_refuse(__func__, "device memory cannot be shared between processes here; add it to memory.c");
}

FAKE_CANN_API int aclrtMemImportFromShareableHandle(uint64_t shared, int32_t device, void **handle)
{
    (void)shared;
    (void)device;
    (void)handle;
    return fake_cann_refuse(__func__, "device memory cannot be shared between processes here; add it to memory.c");
}

FAKE_CANN_API int aclrtMemSetPidToShareableHandle(uint64_t shared, int32_t *processes, size_t count)
{
    (void)shared;
    (void)processes;
    (void)count;
    return fake_cann_refuse(__func__, "device memory cannot be shared between processes here; add it to memory.c");
}
