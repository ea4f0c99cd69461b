/*
 * Stands in for the profiling calls of libascendcl and libruntime (Msprof*, aclmdl*Dump).  They answer success and
 * record nothing: torch-npu calls them on its way, whether anybody profiles or not. Leaves out: aclprof*, which
 * torch-npu looks up when a profile is wanted, and then names.
 */
#include "fake_cann.h"

#include <time.h>

FAKE_CANN_API int MsprofRegisterCallback(uint32_t module, void *handle)
{
    (void)module;
    (void)handle;
    return 0;
}

FAKE_CANN_API int MsprofReportApi(uint32_t flag, const void *call)
{
    (void)flag;
    (void)call;
    return 0;
}

FAKE_CANN_API int MsprofReportCompactInfo(uint32_t flag, const void *data, uint32_t length)
{
    (void)flag;
    (void)data;
    (void)length;
    return 0;
}

FAKE_CANN_API int MsprofReportAdditionalInfo(uint32_t flag, const void *data, uint32_t length)
{
    (void)flag;
    (void)data;
    (void)length;
    return 0;
}

/* FNV-1a, so that different names have different numbers. */
FAKE_CANN_API uint64_t MsprofGetHashId(const char *text, size_t length)
{
    uint64_t hash = 14695981039346656037ULL;
    for (size_t i = 0; i < length; i++) {
        hash = (hash ^ (unsigned char)text[i]) * 1099511628211ULL;
    }
    return hash;
}

FAKE_CANN_API uint64_t MsprofSysCycleTime(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000ULL + (uint64_t)now.tv_nsec;
}

FAKE_CANN_API int aclmdlInitDump(void)
{
    return ACL_SUCCESS;
}

FAKE_CANN_API int aclmdlSetDump(const char *config_path)
{
    (void)config_path;
    return ACL_SUCCESS;
}

FAKE_CANN_API int aclmdlFinalizeDump(void)
{
    return ACL_SUCCESS;
}
