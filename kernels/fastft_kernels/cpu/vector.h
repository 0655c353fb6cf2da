/* Numbers by the vector: conversions from and to bf16, the exponential, and what else several files do with WIDTH floats
   at a time. A file may ask for another WIDTH than 16 by defining it before this one is included.

   They are GNU vectors, which a compiler splits where a processor's are smaller. No function of libm is called in a loop:
   none works on vectors everywhere. */

#ifndef FASTFT_VECTOR_H
#define FASTFT_VECTOR_H

#include "common.h"

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi" /* how vectors would be given to functions: all of them are inlined */
#endif

#ifndef WIDTH
#define WIDTH 16
#endif

typedef float Floats __attribute__((vector_size(4 * WIDTH)));
typedef int32_t Ints __attribute__((vector_size(4 * WIDTH)));
typedef uint32_t Bits __attribute__((vector_size(4 * WIDTH)));
typedef uint16_t Halves __attribute__((vector_size(2 * WIDTH)));

#define INLINE static inline __attribute__((always_inline))

/* Elements of two vectors by their places, those of b behind those of a; INTS is the vectors' type in integers. */
#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLED(INTS, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLED(INTS, a, b, ...) __builtin_shuffle(a, b, (INTS){__VA_ARGS__})
#endif

INLINE float widened(uint16_t narrow) {
    uint32_t bits = (uint32_t)narrow << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

INLINE float same(float value) { return value; }

/* float32 to bf16: to nearest, ties to even, as torch does. */
INLINE uint16_t narrowed(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return (bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : (uint16_t)rounded;
}

/* As `narrowed`, in the upper halves of the bits. */
INLINE Bits rounded(Floats values) {
    const Bits bits = (Bits)values, is_none = (Bits)((bits & 0x7fffffff) > 0x7f800000);
    return ((bits + 0x7fff + ((bits >> 16) & 1)) & ~is_none & 0xffff0000) | (is_none & 0x7fc00000);
}

INLINE Floats all_widened(Halves halves) { return (Floats)(__builtin_convertvector(halves, Bits) << 16); }
INLINE Halves all_narrowed(Floats values) { return __builtin_convertvector(rounded(values) >> 16, Halves); }

INLINE Floats all_of(float value) { return value - (Floats){0}; }

/* `a` where the mask, of a comparison, is set, and `b` elsewhere. */
INLINE Floats pick(Ints mask, Floats a, Floats b) { return (Floats)((mask & (Ints)a) | (~mask & (Ints)b)); }

/* A whole vector of an array, at any place. */
INLINE Floats floats_at(const float *array) {
    Floats floats;
    memcpy(&floats, array, sizeof floats);
    return floats;
}

INLINE void put(float *array, Floats values) { memcpy(array, &values, sizeof values); }

/* Elements `i` to `i + count` of an array of float32, or of bf16 where it is narrow; 0 beyond them. */
INLINE Floats load(const void *array, int64_t i, int count, int is_narrow) {
    if (is_narrow) {
        Halves halves = {0};
        memcpy(&halves, (const uint16_t *)array + i, count * sizeof(uint16_t));
        return all_widened(halves);
    }
    Floats floats = {0};
    memcpy(&floats, (const float *)array + i, count * sizeof(float));
    return floats;
}

INLINE void store(void *array, int64_t i, int count, int is_narrow, Floats values) {
    if (is_narrow) {
        const Halves halves = all_narrowed(values);
        memcpy((uint16_t *)array + i, &halves, count * sizeof(uint16_t));
    } else
        memcpy((float *)array + i, &values, count * sizeof(float));
}

/* The array's elements, whole vectors or the elements that are left at its end: WIDTH is known to the compiler. */
#define BY_WIDTH(I, FROM, TO, WHAT)                                                                                    \
    do {                                                                                                               \
        int64_t I = FROM;                                                                                              \
        for (; I + WIDTH <= (TO); I += WIDTH) WHAT(I, WIDTH);                                                          \
        if (I < (TO)) WHAT(I, (int)((TO)-I));                                                                          \
    } while (0)

INLINE float sum_of(Floats values) {
    float lanes[WIDTH];
    memcpy(lanes, &values, sizeof lanes);
    for (int half = WIDTH / 2; half; half /= 2)
        for (int i = 0; i < half; i++) lanes[i] += lanes[i + half];
    return lanes[0];
}

/* The largest, none of which is looked at that is no number. */
INLINE float largest_of(Floats values) {
    float lanes[WIDTH];
    memcpy(lanes, &values, sizeof lanes);
    for (int half = WIDTH / 2; half; half /= 2)
        for (int i = 0; i < half; i++) lanes[i] = lanes[i + half] > lanes[i] ? lanes[i + half] : lanes[i];
    return lanes[0];
}

/* e^x for x <= 1, with a relative error below 0.71 * 2^-23, fused multiply-adds or not, and 0 below
   -126 ln 2, where it would be less than a normal number; NaN stays NaN.

   x = n ln 2 + r with |r| <= ln 2 / 2: n is rounded by an addition that leaves no bits for a fraction, ln 2 taken off in
   two parts (Cody, Waite 1980, "Software Manual for the Elementary Functions"), and e^r a polynomial, the coefficients
   those of Cephes' expf (Moshier 1992). 2^n is its exponent's bits. */
INLINE Floats exp_of(Floats x) {
    const Floats shifted = x * 1.44269504f + 12582912.0f; /* 1.5 * 2^23: its bits end in those of n */
    const Floats n = shifted - 12582912.0f;
    const Floats r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
    Floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    const Floats power = (Floats)(((Bits)shifted << 23) + 0x3f800000);
    return (Floats)((Ints)(p * power) & ~(Ints)(x < -87.3365f));
}

#endif
