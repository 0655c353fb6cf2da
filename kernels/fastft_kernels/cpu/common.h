/* What the C files share. Each function that Python calls does one part of its work: the `part`th of `parts` equal ones,
   from as many threads at once. A wrong address is not found out here: the callers in Python look at every tensor. */

#ifndef FASTFT_COMMON_H
#define FASTFT_COMMON_H

#include <math.h>
#include <stdint.h>
#include <string.h>

/* One part of a function's work. */
typedef void Task(const void *arguments, int64_t part, int64_t parts);

static inline float widened(uint16_t narrow) {
    uint32_t bits = (uint32_t)narrow << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline float same(float value) { return value; }

/* float32 to bf16: to nearest, ties to even, as torch does. */
static inline uint16_t narrowed(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return (bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : (uint16_t)rounded;
}

/* Where the `part`th of `parts` equal parts of `size` things begins; the next one's beginning is its end. */
static inline int64_t beginning(int64_t size, int64_t part, int64_t parts) {
    return size / parts * part + (size % parts < part ? size % parts : part);
}

#endif
