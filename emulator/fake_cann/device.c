/*
 * Stands in for libascendcl's initialisation, device, context and version calls.
 * Leaves out: more than one context per device, resetting a device (its memory stays), utilisation (always 0), and the
 * rule that a thread must call aclrtSetDevice before it uses a device (device 0 is assumed).
 */
#define _GNU_SOURCE
#include "fake_cann.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define AI_CORES 24 /* Ascend 910B2: 24 cube cores, 48 vector cores, 192 MiB of L2 */
#define VECTOR_CORES 48
#define L2_BYTES (192LL << 20)

static __thread int thread_device = -1;
static __thread char thread_message[512];
static int contexts[FAKE_CANN_MAX_DEVICES];
static bool device_in_use[FAKE_CANN_MAX_DEVICES];

long fake_cann_environment(const char *name, long value_if_unset)
{
    const char *text = getenv(name);
    return text != NULL && *text != '\0' ? atol(text) : value_if_unset;
}

void fake_cann_trace(const char *function)
{
    static int level = -1;
    if (level < 0) {
        level = (int)fake_cann_environment("FAKE_CANN_TRACE", 0);
    }
    if (level > 0) {
        fprintf(stderr, "[fake_cann] %s\n", function);
    }
}

int fake_cann_fail(int error, const char *format, ...)
{
    va_list values;
    va_start(values, format);
    vsnprintf(thread_message, sizeof thread_message, format, values);
    va_end(values);
    fprintf(stderr, "[fake_cann] %s\n", thread_message);
    return error;
}

int fake_cann_refuse(const char *function, const char *why)
{
    return fake_cann_fail(ACL_ERROR_RT_FEATURE_NOT_SUPPORT, "%s: %s", function, why);
}

/* ---- which devices there are ---- */

static int physical_device_count(void)
{
    long count = fake_cann_environment("FAKE_CANN_DEVICES", 1);
    if (count < 0) {
        return 0;
    }
    return count > FAKE_CANN_MAX_DEVICES ? FAKE_CANN_MAX_DEVICES : (int)count;
}

/*
 * Fills `visible` with the physical ids that ASCEND_RT_VISIBLE_DEVICES lists, up to the first that is no device;
 * returns how many.  Read anew at each call: Ray and vLLM set the variable before the first use of a device, but after
 * the import.
 */
static int visible_devices(int visible[FAKE_CANN_MAX_DEVICES])
{
    int physical = physical_device_count();
    const char *list = getenv("ASCEND_RT_VISIBLE_DEVICES");
    int count = 0;
    if (list == NULL) {
        for (; count < physical; count++) {
            visible[count] = count;
        }
        return count;
    }
    while (*list != '\0' && count < FAKE_CANN_MAX_DEVICES) {
        char *end;
        long device = strtol(list, &end, 10);
        if (end == list || device < 0 || device >= physical) {
            break;
        }
        visible[count++] = (int)device;
        list = *end == ',' ? end + 1 : end;
    }
    return count;
}

int fake_cann_device_count(void)
{
    int visible[FAKE_CANN_MAX_DEVICES];
    return visible_devices(visible);
}

int fake_cann_physical_device(int logical_device)
{
    int visible[FAKE_CANN_MAX_DEVICES];
    int count = visible_devices(visible);
    return logical_device >= 0 && logical_device < count ? visible[logical_device] : 0;
}

int fake_cann_current_device(void)
{
    return thread_device < 0 ? 0 : thread_device;
}

size_t fake_cann_hbm_bytes(void)
{
    return (size_t)fake_cann_environment("FAKE_CANN_HBM_MB", 65536) << 20;
}

/* ---- initialisation ---- */

FAKE_CANN_API int aclInit(const char *config_path)
{
    (void)config_path;
    fake_cann_trace(__func__);
    return ACL_SUCCESS;
}

FAKE_CANN_API int aclFinalize(void)
{
    fake_cann_trace(__func__);
    return ACL_SUCCESS;
}

/* ---- devices and contexts ---- */

FAKE_CANN_API int aclrtGetDeviceCount(uint32_t *count)
{
    *count = (uint32_t)fake_cann_device_count();
    return ACL_SUCCESS;
}

FAKE_CANN_API int aclrtSetDevice(int32_t device)
{
    fake_cann_trace(__func__);
    if (device < 0 || device >= fake_cann_device_count()) {
        return fake_cann_fail(ACL_ERROR_RT_INVALID_DEVICEID, "aclrtSetDevice: device %d of %d does not exist", device,
                              fake_cann_device_count());
    }
    thread_device = device;
    device_in_use[device] = true;
    return ACL_SUCCESS;
}

FAKE_CANN_API int aclrtResetDevice(int32_t device)
{
    fake_cann_trace(__func__);
    if (device < 0 || device >= fake_cann_device_count()) {
        return ACL_ERROR_RT_INVALID_DEVICEID;
    }
    fake_cann_finish_all_streams(true);
    device_in_use[device] = false;
    return ACL_SUCCESS;
}

FAKE_CANN_API int aclrtGetDevice(int32_t *device)
{
    if (thread_device < 0) {
        return ACL_ERROR_RT_CONTEXT_NULL;
    }
    *device = thread_device;
    return ACL_SUCCESS;
}

FAKE_CANN_API int aclrtGetCurrentContext(void **context)
{
    if (thread_device < 0) {
        return ACL_ERROR_RT_CONTEXT_NULL;
    }
    *context = &contexts[thread_device];
    return ACL_SUCCESS;
}

FAKE_CANN_API int aclrtSetCurrentContext(void *context)
{
    int *chosen = context;
    if (chosen < contexts || chosen >= contexts + FAKE_CANN_MAX_DEVICES) {
        return ACL_ERROR_RT_CONTEXT_NULL;
    }
    return aclrtSetDevice((int32_t)(chosen - contexts));
}

FAKE_CANN_API int aclrtCreateContext(void **context, int32_t device)
{
    int error = aclrtSetDevice(device);
    if (error == ACL_SUCCESS) {
        *context = &contexts[device];
    }
    return error;
}

FAKE_CANN_API int aclrtDestroyContext(void *context)
{
    (void)context;
    return ACL_SUCCESS;
}

FAKE_CANN_API int aclrtGetPrimaryCtxState(int32_t device, uint32_t *flags, int32_t *active)
{
    if (device < 0 || device >= fake_cann_device_count()) {
        return ACL_ERROR_RT_INVALID_DEVICEID;
    }
    if (flags != NULL) {
        *flags = 0;
    }
    if (active != NULL) {
        *active = device_in_use[device];
    }
    return ACL_SUCCESS;
}

FAKE_CANN_API int aclrtDeviceCanAccessPeer(int32_t *can_access, int32_t device, int32_t peer)
{
    *can_access = device != peer;
    return ACL_SUCCESS;
}

FAKE_CANN_API int aclrtDeviceEnablePeerAccess(int32_t peer, uint32_t flags)
{
    (void)peer;
    (void)flags;
    return ACL_SUCCESS;
}

FAKE_CANN_API int aclrtDeviceGetBareTgid(int32_t *process)
{
    *process = getpid();
    return ACL_SUCCESS;
}

FAKE_CANN_API int aclrtGetRunMode(int *mode)
{
    *mode = 1; /* ACL_HOST */
    return ACL_SUCCESS;
}

/* ---- what the device is ---- */

FAKE_CANN_API const char *aclrtGetSocName(void)
{
    const char *name = getenv("FAKE_CANN_SOC");
    return name != NULL ? name : "Ascend910B2";
}

FAKE_CANN_API int aclGetDeviceCapability(uint32_t device, int what, int64_t *value)
{
    (void)device;
    switch (what) {
    case 0: /* ACL_DEVICE_INFO_AI_CORE_NUM */
        *value = AI_CORES;
        return ACL_SUCCESS;
    case 1: /* ACL_DEVICE_INFO_VECTOR_CORE_NUM */
        *value = VECTOR_CORES;
        return ACL_SUCCESS;
    case 2: /* ACL_DEVICE_INFO_L2_SIZE */
        *value = L2_BYTES;
        return ACL_SUCCESS;
    default:
        return fake_cann_refuse(__func__, "this attribute is unknown here; add it to device.c");
    }
}

FAKE_CANN_API int aclrtGetDeviceInfo(uint32_t device, int attribute, int64_t *value)
{
    switch (attribute) {
    case 1: /* ACL_DEV_ATTR_AICPU_CORE_NUM */
        *value = 6;
        return ACL_SUCCESS;
    case 101: /* ACL_DEV_ATTR_AICORE_CORE_NUM */
    case 102: /* ACL_DEV_ATTR_CUBE_CORE_NUM */
        *value = AI_CORES;
        return ACL_SUCCESS;
    case 201: /* ACL_DEV_ATTR_VECTOR_CORE_NUM */
        *value = VECTOR_CORES;
        return ACL_SUCCESS;
    case 301: /* ACL_DEV_ATTR_TOTAL_GLOBAL_MEM_SIZE */
        *value = (int64_t)fake_cann_hbm_bytes();
        return ACL_SUCCESS;
    case 302: /* ACL_DEV_ATTR_L2_CACHE_SIZE */
        *value = L2_BYTES;
        return ACL_SUCCESS;
    case 402: /* ACL_DEV_ATTR_PHY_CHIP_ID */
        *value = fake_cann_physical_device((int)device);
        return ACL_SUCCESS;
    default:
        return fake_cann_fail(ACL_ERROR_RT_FEATURE_NOT_SUPPORT,
                              "aclrtGetDeviceInfo: attribute %d is unknown here; add it to device.c", attribute);
    }
}

FAKE_CANN_API int aclrtGetDeviceUtilizationRate(int32_t device, void *utilization)
{
    (void)device;
    memset(utilization, 0, 4 * sizeof(int32_t)); /* cube, vector, AI CPU, memory */
    return ACL_SUCCESS;
}

/* ---- versions ---- */

FAKE_CANN_API int aclrtGetVersion(int32_t *major, int32_t *minor, int32_t *patch)
{
    *major = 1;
    *minor = 17;
    *patch = 0;
    return ACL_SUCCESS;
}

struct cann_version { /* aclCANNPackageVersion */
    char version[128];
    char major[64];
    char minor[64];
    char release[64];
    char patch[64];
    char reserved[128];
};

FAKE_CANN_API int aclsysGetCANNVersion(int package, struct cann_version *version)
{
    (void)package;
    const char *claimed = getenv("FAKE_CANN_VERSION");
    if (claimed == NULL) {
        claimed = "8.5.0";
    }
    memset(version, 0, sizeof *version);
    snprintf(version->version, sizeof version->version, "%s", claimed);
    sscanf(claimed, "%63[^.].%63[^.].%63s", version->major, version->minor, version->release);
    return ACL_SUCCESS;
}

/* ---- errors and logs ---- */

FAKE_CANN_API const char *aclGetRecentErrMsg(void)
{
    return thread_message[0] != '\0' ? thread_message : "fake_cann: no further message";
}

FAKE_CANN_API int aclrtPeekAtLastError(int level)
{
    (void)level;
    return ACL_SUCCESS;
}

FAKE_CANN_API int aclrtGetLastError(int level)
{
    (void)level;
    return ACL_SUCCESS;
}

FAKE_CANN_API void aclAppLog(int level, const char *function, const char *file, uint32_t line, const char *format, ...)
{
    if (fake_cann_environment("FAKE_CANN_TRACE", 0) < 2) {
        return;
    }
    va_list values;
    va_start(values, format);
    fprintf(stderr, "[fake_cann log %d] %s:%u %s: ", level, file, line, function);
    vfprintf(stderr, format, values);
    fprintf(stderr, "\n");
    va_end(values);
}

/* ---- settings that change nothing on a CPU ---- */

FAKE_CANN_API int aclrtSetDeviceSatMode(int mode)
{
    (void)mode;
    return ACL_SUCCESS;
}

FAKE_CANN_API int aclSetCompileopt(int option, const char *value)
{
    (void)option;
    (void)value;
    return ACL_SUCCESS;
}

static const char compile_option[] = "allow_fp32_to_fp16"; /* the default of ACL_PRECISION_MODE */

FAKE_CANN_API size_t aclGetCompileoptSize(int option)
{
    (void)option;
    return sizeof compile_option;
}

FAKE_CANN_API int aclGetCompileopt(int option, char *value, size_t length)
{
    (void)option;
    snprintf(value, length, "%s", compile_option);
    return ACL_SUCCESS;
}

static int64_t system_parameters[8];

FAKE_CANN_API int aclrtSetSysParamOpt(int option, int64_t value)
{
    if (option < 0 || option >= 8) {
        return ACL_ERROR_RT_PARAM_INVALID;
    }
    system_parameters[option] = value;
    return ACL_SUCCESS;
}

FAKE_CANN_API int aclrtCtxSetSysParamOpt(int option, int64_t value)
{
    return aclrtSetSysParamOpt(option, value);
}

FAKE_CANN_API int aclrtGetSysParamOpt(int option, int64_t *value)
{
    if (option < 0 || option >= 8) {
        return ACL_ERROR_RT_PARAM_INVALID;
    }
    *value = system_parameters[option];
    return ACL_SUCCESS;
}

FAKE_CANN_API int aclrtSetOpWaitTimeout(uint32_t seconds)
{
    (void)seconds;
    return ACL_SUCCESS;
}

FAKE_CANN_API int aclrtSetOpExecuteTimeOut(uint32_t seconds)
{
    (void)seconds;
    return ACL_SUCCESS;
}
