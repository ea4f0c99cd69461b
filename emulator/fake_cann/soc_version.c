/*
 * Stands in for: libruntime's rtGetSocVersion, by which compiled AscendC kernels choose their binary while they are
 * loaded (seen in libvllm_ascend_kernels.so of vllm-ascend 0.11.0; an error there ends in a crash).
 * Leaves out: the rest of libruntime, which torch-npu's own libraries do not need.
 */
#include "fake_cann.h"

#include <stdio.h>

enum { RT_ERROR_PARAMETER = 107000 }; /* ACL_ERROR_RT_PARAM_INVALID ("aclError", CANN documentation) */

FAKE_CANN_API const char *aclrtGetSocName(void);

/* Writes the SoC's name with its end mark; 0, or 107000 where `size` bytes are too few. */
FAKE_CANN_API int rtGetSocVersion(char *version, uint32_t size)
{
    if (version == NULL) {
        return RT_ERROR_PARAMETER;
    }
    int length = snprintf(version, size, "%s", aclrtGetSocName());
    return length >= 0 && (uint32_t)length < size ? 0 : RT_ERROR_PARAMETER;
}
