/*
 * Element types and reductions of the stand-in HCCL.
 * Leaves out: int128 and the 8-bit floats (sent as bytes, not reduced), and any claim about the order in which hardware
 * adds: here it is by rank, and the 16-bit floats are rounded once, at the end.
 */
#include "hccl_channel.h"

#include <string.h>

enum { SUM = 0, PROD = 1, MAX = 2, MIN = 3 };

enum {
    INT8,
    INT16,
    INT32,
    FP16,
    FP32,
    INT64,
    UINT64,
    UINT8,
    UINT16,
    UINT32,
    FP64,
    BFP16,
    INT128,
    HIF8 = 14,
    FP8E4M3,
    FP8E5M2,
    FP8E8M0
};

#define BLOCK 1024

size_t fake_hccl_element_bytes(int type)
{
    switch (type) {
    case INT8:
    case UINT8:
    case HIF8:
    case FP8E4M3:
    case FP8E5M2:
    case FP8E8M0:
        return 1;
    case INT16:
    case UINT16:
    case FP16:
    case BFP16:
        return 2;
    case INT32:
    case UINT32:
    case FP32:
        return 4;
    case INT64:
    case UINT64:
    case FP64:
        return 8;
    case INT128:
        return 16;
    default:
        return 0;
    }
}

bool fake_hccl_can_reduce(int type, int operation)
{
    return operation >= SUM && operation <= MIN && type >= INT8 && type <= BFP16;
}

/* ---- 16-bit floats ---- */

static float float_from_bits(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static uint32_t bits_of_float(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static float from_bfloat16(uint16_t half)
{
    return float_from_bits((uint32_t)half << 16);
}

static uint16_t to_bfloat16(float value)
{
    uint32_t bits = bits_of_float(value);
    if (value != value) {
        return 0x7FC0;
    }
    return (uint16_t)((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16); /* to nearest, ties to even */
}

static float from_float16(uint16_t half)
{
    uint32_t sign = (uint32_t)(half & 0x8000) << 16;
    uint32_t exponent = (half >> 10) & 0x1F;
    uint32_t fraction = half & 0x3FF;
    if (exponent == 0) { /* zero and subnormals: fraction * 2^-24 */
        float size = (float)fraction * 0x1p-24f;
        return float_from_bits(bits_of_float(size) | sign);
    }
    uint32_t wide = exponent == 0x1F ? 0xFF : exponent + 112;
    return float_from_bits(sign | (wide << 23) | (fraction << 13));
}

static uint16_t to_float16(float value)
{
    uint32_t bits = bits_of_float(value);
    uint16_t sign = (uint16_t)((bits >> 16) & 0x8000);
    bits &= 0x7FFFFFFF;
    if (bits > 0x7F800000) {
        return sign | 0x7E00;
    }
    if (bits >= 0x477FF000) { /* 65520 and above round to infinity */
        return sign | 0x7C00;
    }
    if (bits < 0x38800000) { /* below 2^-14: adding 0.5 rounds to a multiple of 2^-24, to even */
        float shifted = float_from_bits(bits) + 0.5f;
        return sign | (uint16_t)(bits_of_float(shifted) - bits_of_float(0.5f));
    }
    uint32_t rounded = bits + 0xFFF + ((bits >> 13) & 1);
    return sign | (uint16_t)((rounded - 0x38000000) >> 13);
}

static void widen(int type, float *into, const uint16_t *from, size_t count)
{
    for (size_t i = 0; i < count; i++) {
        into[i] = type == BFP16 ? from_bfloat16(from[i]) : from_float16(from[i]);
    }
}

static void narrow(int type, uint16_t *into, const float *from, size_t count)
{
    for (size_t i = 0; i < count; i++) {
        into[i] = type == BFP16 ? to_bfloat16(from[i]) : to_float16(from[i]);
    }
}

/* ---- into = into (op) from ---- */

/* A function that combines two arrays element by element. */
#define COMBINE(name, element, expression)                                                                             \
    static void name(void *into_, const void *from_, size_t count)                                                     \
    {                                                                                                                  \
        element *into = into_;                                                                                         \
        const element *from = from_;                                                                                   \
        for (size_t i = 0; i < count; i++) {                                                                           \
            element a = into[i];                                                                                       \
            element b = from[i];                                                                                       \
            into[i] = (element)(expression);                                                                           \
        }                                                                                                              \
    }

/* Sums and products of integers wrap, so they are the same for signed and unsigned. */
COMBINE(sum_u8, uint8_t, a + b)
COMBINE(sum_u16, uint16_t, a + b)
COMBINE(sum_u32, uint32_t, a + b)
COMBINE(sum_u64, uint64_t, a + b)
COMBINE(sum_f32, float, a + b)
COMBINE(sum_f64, double, a + b)
COMBINE(prod_u8, uint8_t, a *b)
COMBINE(prod_u16, uint16_t, (uint32_t)a *b)
COMBINE(prod_u32, uint32_t, a *b)
COMBINE(prod_u64, uint64_t, a *b)
COMBINE(prod_f32, float, a *b)
COMBINE(prod_f64, double, a *b)
COMBINE(max_i8, int8_t, a > b ? a : b)
COMBINE(max_i16, int16_t, a > b ? a : b)
COMBINE(max_i32, int32_t, a > b ? a : b)
COMBINE(max_i64, int64_t, a > b ? a : b)
COMBINE(max_u8, uint8_t, a > b ? a : b)
COMBINE(max_u16, uint16_t, a > b ? a : b)
COMBINE(max_u32, uint32_t, a > b ? a : b)
COMBINE(max_u64, uint64_t, a > b ? a : b)
COMBINE(max_f32, float, a > b ? a : b)
COMBINE(max_f64, double, a > b ? a : b)
COMBINE(min_i8, int8_t, a < b ? a : b)
COMBINE(min_i16, int16_t, a < b ? a : b)
COMBINE(min_i32, int32_t, a < b ? a : b)
COMBINE(min_i64, int64_t, a < b ? a : b)
COMBINE(min_u8, uint8_t, a < b ? a : b)
COMBINE(min_u16, uint16_t, a < b ? a : b)
COMBINE(min_u32, uint32_t, a < b ? a : b)
COMBINE(min_u64, uint64_t, a < b ? a : b)
COMBINE(min_f32, float, a < b ? a : b)
COMBINE(min_f64, double, a < b ? a : b)

typedef void (*combine)(void *, const void *, size_t);

static const combine combines[BFP16 + 1][MIN + 1] = {
    [INT8] = {sum_u8, prod_u8, max_i8, min_i8},      [UINT8] = {sum_u8, prod_u8, max_u8, min_u8},
    [INT16] = {sum_u16, prod_u16, max_i16, min_i16}, [UINT16] = {sum_u16, prod_u16, max_u16, min_u16},
    [INT32] = {sum_u32, prod_u32, max_i32, min_i32}, [UINT32] = {sum_u32, prod_u32, max_u32, min_u32},
    [INT64] = {sum_u64, prod_u64, max_i64, min_i64}, [UINT64] = {sum_u64, prod_u64, max_u64, min_u64},
    [FP32] = {sum_f32, prod_f32, max_f32, min_f32},  [FP64] = {sum_f64, prod_f64, max_f64, min_f64},
};

static void reduce_halves(int type, int operation, uint16_t *into, const void *const *sources, unsigned ranks,
                          size_t count)
{
    float total[BLOCK];
    float next[BLOCK];
    for (size_t start = 0; start < count; start += BLOCK) {
        size_t length = count - start < BLOCK ? count - start : BLOCK;
        widen(type, total, (const uint16_t *)sources[0] + start, length);
        for (unsigned rank = 1; rank < ranks; rank++) {
            widen(type, next, (const uint16_t *)sources[rank] + start, length);
            combines[FP32][operation](total, next, length);
        }
        narrow(type, into + start, total, length);
    }
}

void fake_hccl_reduce(int type, int operation, void *into, const void *const *sources, unsigned ranks, size_t count)
{
    if (type == FP16 || type == BFP16) {
        reduce_halves(type, operation, into, sources, ranks, count);
        return;
    }
    memcpy(into, sources[0], count * fake_hccl_element_bytes(type));
    for (unsigned rank = 1; rank < ranks; rank++) {
        combines[type][operation](into, sources[rank], count);
    }
}
