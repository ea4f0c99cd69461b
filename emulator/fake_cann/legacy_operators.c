/*
 * Stands in for libacl_op_compiler and the kernel-launch part of libruntime: descriptors of tensors, buffers and
 * attributes are kept, and the operators of a short table are run, on the calling thread.  Every other one is refused
 * by name. Leaves out: nearly every operator.  aclnn operators (libopapi) are not even declared: torch-npu looks each
 * one up by name and names the missing one.
 */
#include "fake_cann.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MAX_DIMENSIONS 16

struct tensor_description {
    int type;
    int format;
    int dimensions;
    int64_t shape[MAX_DIMENSIONS];
};

struct data_buffer {
    void *data;
    size_t bytes;
};

FAKE_CANN_API int aclSetTensorShape(struct tensor_description *tensor, int dimensions, const int64_t *shape)
{
    if (dimensions < 0 || dimensions > MAX_DIMENSIONS) {
        return ACL_ERROR_INVALID_PARAM;
    }
    tensor->dimensions = dimensions;
    if (dimensions > 0) {
        memcpy(tensor->shape, shape, (size_t)dimensions * sizeof *shape);
    }
    return ACL_SUCCESS;
}

FAKE_CANN_API void *aclCreateTensorDesc(int type, int dimensions, const int64_t *shape, int format)
{
    struct tensor_description *tensor = calloc(1, sizeof *tensor);
    if (tensor == NULL || aclSetTensorShape(tensor, dimensions, shape) != ACL_SUCCESS) {
        free(tensor);
        return NULL;
    }
    tensor->type = type;
    tensor->format = format;
    return tensor;
}

FAKE_CANN_API void aclDestroyTensorDesc(void *tensor)
{
    free(tensor);
}

FAKE_CANN_API int aclGetTensorDescType(const struct tensor_description *tensor)
{
    return tensor->type;
}

FAKE_CANN_API int aclGetTensorDescFormat(const struct tensor_description *tensor)
{
    return tensor->format;
}

FAKE_CANN_API size_t aclGetTensorDescNumDims(const struct tensor_description *tensor)
{
    return (size_t)tensor->dimensions;
}

FAKE_CANN_API int aclGetTensorDescDimV2(const struct tensor_description *tensor, size_t index, int64_t *size)
{
    if (index >= (size_t)tensor->dimensions) {
        return ACL_ERROR_INVALID_PARAM;
    }
    *size = tensor->shape[index];
    return ACL_SUCCESS;
}

FAKE_CANN_API void aclSetTensorDescName(void *tensor, const char *name)
{
    (void)tensor;
    (void)name;
}

FAKE_CANN_API int aclSetTensorFormat(void *tensor, int storage_format)
{
    (void)tensor;
    (void)storage_format;
    return ACL_SUCCESS;
}

FAKE_CANN_API int aclSetTensorPlaceMent(void *tensor, int memory)
{
    (void)tensor;
    (void)memory;
    return ACL_SUCCESS;
}

FAKE_CANN_API void *aclCreateDataBuffer(void *data, size_t bytes)
{
    struct data_buffer *buffer = malloc(sizeof *buffer);
    if (buffer != NULL) {
        *buffer = (struct data_buffer){data, bytes};
    }
    return buffer;
}

FAKE_CANN_API int aclDestroyDataBuffer(void *buffer)
{
    free(buffer);
    return ACL_SUCCESS;
}

/* ---- attributes: those that an operator below reads are kept ---- */

struct attributes {
    char mode[32];
    bool paddings_contiguous;
};

FAKE_CANN_API void *aclopCreateAttr(void)
{
    return calloc(1, sizeof(struct attributes));
}

FAKE_CANN_API void aclopDestroyAttr(void *attributes)
{
    free(attributes);
}

FAKE_CANN_API int aclopSetAttrBool(struct attributes *attributes, const char *name, uint8_t value)
{
    if (strcmp(name, "paddings_contiguous") == 0) {
        attributes->paddings_contiguous = value != 0;
    }
    return ACL_SUCCESS;
}

FAKE_CANN_API int aclopSetAttrInt(void *attributes, const char *name, int64_t value)
{
    (void)attributes;
    (void)name;
    (void)value;
    return ACL_SUCCESS;
}

FAKE_CANN_API int aclopSetAttrFloat(void *attributes, const char *name, float value)
{
    (void)attributes;
    (void)name;
    (void)value;
    return ACL_SUCCESS;
}

FAKE_CANN_API int aclopSetAttrDataType(void *attributes, const char *name, int value)
{
    (void)attributes;
    (void)name;
    (void)value;
    return ACL_SUCCESS;
}

FAKE_CANN_API int aclopSetAttrString(struct attributes *attributes, const char *name, const char *value)
{
    if (strcmp(name, "mode") == 0) {
        snprintf(attributes->mode, sizeof attributes->mode, "%s", value);
    }
    return ACL_SUCCESS;
}

FAKE_CANN_API int aclopSetAttrListBool(void *attributes, const char *name, int count, const uint8_t *values)
{
    (void)attributes;
    (void)name;
    (void)count;
    (void)values;
    return ACL_SUCCESS;
}

FAKE_CANN_API int aclopSetAttrListInt(void *attributes, const char *name, int count, const int64_t *values)
{
    (void)attributes;
    (void)name;
    (void)count;
    (void)values;
    return ACL_SUCCESS;
}

FAKE_CANN_API int aclopSetAttrListFloat(void *attributes, const char *name, int count, const float *values)
{
    (void)attributes;
    (void)name;
    (void)count;
    (void)values;
    return ACL_SUCCESS;
}

FAKE_CANN_API int aclopSetAttrListListInt(void *attributes, const char *name, int lists, const int *counts,
                                          const int64_t *const values[])
{
    (void)attributes;
    (void)name;
    (void)lists;
    (void)counts;
    (void)values;
    return ACL_SUCCESS;
}

/* ---- execution: the few operators that torch-npu's own C++ code asks for without passing the dispatcher ---- */

struct launch {
    const struct attributes *attributes;
    int inputs;
    const struct tensor_description *const *input_tensors;
    const struct data_buffer *const *input_buffers;
    int outputs;
    const struct tensor_description *const *output_tensors;
    struct data_buffer *const *output_buffers;
};

static size_t element_bytes(int type) /* aclDataType; 0: not among those below */
{
    static const size_t bytes[] = {4, 2, 1, 4, 1, 0, 2, 2, 4, 8, 8, 8, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2};
    return type >= 0 && (size_t)type < sizeof bytes / sizeof *bytes ? bytes[type] : 0;
}

static size_t elements(const struct tensor_description *tensor)
{
    size_t count = 1;
    for (int i = 0; i < tensor->dimensions; i++) {
        count *= (size_t)tensor->shape[i];
    }
    return count;
}

/* Fill(dims, value) -> y: every element of y is `value`.  ProcessGroupHCCL::byte_alignment pads with it. */
static bool run_fill(const struct launch *launch)
{
    if (launch->inputs != 2 || launch->outputs != 1) {
        return false;
    }
    size_t size = element_bytes(launch->output_tensors[0]->type);
    size_t count = elements(launch->output_tensors[0]);
    const struct data_buffer *value = launch->input_buffers[1];
    struct data_buffer *output = launch->output_buffers[0];
    bool same_type = launch->input_tensors[1]->type == launch->output_tensors[0]->type;
    if (size == 0 || !same_type || value->bytes < size || output->bytes < count * size) {
        return false;
    }
    for (size_t i = 0; i < count; i++) {
        memcpy((char *)output->data + i * size, value->data, size);
    }
    return true;
}

/* The padding before dimension d (after it: d, true), from a vector of 32- or 64-bit integers. */
static int64_t padding(const struct launch *launch, int dimension, bool after)
{
    size_t index = 2 * (size_t)dimension + after;
    if (launch->input_tensors[1]->type == 3) { /* ACL_INT32 */
        return ((const int32_t *)launch->input_buffers[1]->data)[index];
    }
    return ((const int64_t *)launch->input_buffers[1]->data)[index];
}

/*
 * PadV3(x, paddings, value) -> y, mode "constant": x in the middle of y, `value` around it.
 * ProcessGroupHCCL::byte_alignment (torch-npu 2.13) pads with it what dist.all_gather gets.
 */
static bool run_pad(const struct launch *launch)
{
    if (launch->inputs != 3 || launch->outputs != 1 || launch->attributes == NULL) {
        return false;
    }
    const struct tensor_description *from = launch->input_tensors[0];
    const struct tensor_description *to = launch->output_tensors[0];
    size_t size = element_bytes(to->type);
    int dimensions = to->dimensions;
    bool constant = strcmp(launch->attributes->mode, "constant") == 0 && launch->attributes->paddings_contiguous;
    if (!constant || size == 0 || from->type != to->type || from->dimensions != dimensions) {
        return false;
    }
    size_t padding_bytes = 2 * (size_t)dimensions * element_bytes(launch->input_tensors[1]->type);
    if (launch->input_buffers[1]->bytes < padding_bytes || launch->input_buffers[2]->bytes < size) {
        return false;
    }
    for (int d = 0; d < dimensions; d++) {
        if (padding(launch, d, false) < 0 ||
            to->shape[d] != padding(launch, d, false) + from->shape[d] + padding(launch, d, true)) {
            return false;
        }
    }
    char *target = launch->output_buffers[0]->data;
    const char *source = launch->input_buffers[0]->data;
    size_t count = elements(to);
    for (size_t place = 0; place < count; place++) {
        size_t rest = place; /* the output's coordinates, last dimension first, and the input's place that they mean */
        size_t stride = 1;
        size_t from_place = 0;
        bool inside = true;
        for (int d = dimensions - 1; d >= 0; d--) {
            int64_t coordinate = (int64_t)(rest % (size_t)to->shape[d]) - padding(launch, d, false);
            rest /= (size_t)to->shape[d];
            inside = inside && coordinate >= 0 && coordinate < from->shape[d];
            from_place += (size_t)coordinate * stride;
            stride *= (size_t)from->shape[d];
        }
        memcpy(target + place * size, inside ? source + from_place * size : launch->input_buffers[2]->data, size);
    }
    return true;
}

static const struct {
    const char *name;
    bool (*run)(const struct launch *launch); /* false: these operands are not supported */
} operators[] = {
    {"Fill", run_fill},
    {"PadV3", run_pad},
};

FAKE_CANN_API int aclopCompileAndExecute(const char *name, int inputs,
                                         const struct tensor_description *const input_tensors[],
                                         const struct data_buffer *const input_buffers[], int outputs,
                                         const struct tensor_description *const output_tensors[],
                                         struct data_buffer *const output_buffers[],
                                         const struct attributes *attributes, int engine, int compile_flag,
                                         const char *path, void *stream)
{
    (void)engine;
    (void)compile_flag;
    (void)path;
    struct launch launch = {attributes, inputs, input_tensors, input_buffers, outputs, output_tensors, output_buffers};
    for (size_t i = 0; i < sizeof operators / sizeof *operators; i++) {
        if (strcmp(operators[i].name, name) == 0) {
            fake_cann_stream_drain(stream);
            if (operators[i].run(&launch)) {
                return ACL_SUCCESS;
            }
            return fake_cann_fail(ACL_ERROR_RT_FEATURE_NOT_SUPPORT,
                                  "operator %s: not with these operands; add them to legacy_operators.c", name);
        }
    }
    return fake_cann_fail(ACL_ERROR_RT_FEATURE_NOT_SUPPORT,
                          "operator %s of the compiled-operator path (aclop) does not exist here: give its aten or npu "
                          "operator a CPU version in fake_npu, or add it to legacy_operators.c",
                          name);
}

static int refuse_launch(const char *function)
{
    return fake_cann_refuse(function,
                            "there is no device to run a compiled kernel; give its operator a CPU version in fake_npu");
}

FAKE_CANN_API int aclrtBinaryLoadFromData(void)
{
    return refuse_launch(__func__);
}

FAKE_CANN_API int aclrtBinaryGetFunction(void)
{
    return refuse_launch(__func__);
}

FAKE_CANN_API int aclrtGetFunctionAddr(void)
{
    return refuse_launch(__func__);
}

FAKE_CANN_API int rtKernelLaunch(void)
{
    return refuse_launch(__func__);
}

FAKE_CANN_API int rtGetC2cCtrlAddr(void)
{
    return refuse_launch(__func__);
}

/* Compiled libraries register their kernels when they are loaded, used or not: that must pass. */
FAKE_CANN_API int rtDevBinaryRegister(const void *binary, void **handle)
{
    (void)binary;
    static int registered;
    if (handle != NULL) {
        *handle = &registered;
    }
    return ACL_SUCCESS;
}

FAKE_CANN_API int rtFunctionRegister(void)
{
    return ACL_SUCCESS;
}
