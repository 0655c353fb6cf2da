/* What the C files share. Each function that Python calls does one part of its work: the `part`th of `parts` equal ones,
   from as many threads at once. A wrong address is not found out here: the callers in Python look at every tensor. */

#ifndef FASTFT_COMMON_H
#define FASTFT_COMMON_H

#include <math.h>
#include <stdint.h>
#include <string.h>

/* One part of a function's work. */
typedef void Task(const void *arguments, int64_t part, int64_t parts);

/* Where the `part`th of `parts` equal parts of `size` things begins; the next one's beginning is its end. */
static inline int64_t beginning(int64_t size, int64_t part, int64_t parts) {
    return size / parts * part + (size % parts < part ? size % parts : part);
}

#endif
