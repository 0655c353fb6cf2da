/* What is counted, and the functions that Python calls: see ../counters.py. */
#define _GNU_SOURCE
#include "pretended.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static uint64_t counters[COUNTER_COUNT];

static const char *const names[COUNTER_COUNT] = {
#define AS_TEXT(name) #name,
    COUNTERS(AS_TEXT)
#undef AS_TEXT
};

void count(enum counter which) { count_by(which, 1); }

void count_by(enum counter which, uint64_t amount) { __atomic_fetch_add(&counters[which], amount, __ATOMIC_RELAXED); }

void uncount_by(enum counter which, uint64_t amount) { __atomic_fetch_sub(&counters[which], amount, __ATOMIC_RELAXED); }

void note_device_peak(void) {
    uint64_t now = counters[COUNT_device_bytes];
    if (now > counters[COUNT_device_bytes_peak]) counters[COUNT_device_bytes_peak] = now;
}

uint64_t setting(const char *name, uint64_t otherwise) {
    const char *text = getenv(name);
    if (text == NULL || *text == '\0') return otherwise;
    char *end;
    unsigned long long value = strtoull(text, &end, 10);
    if (*end != '\0') {
        say("got %s=%s, expected a whole number", name, text);
        exit(2);
    }
    return value;
}

void say(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    fputs("pretended GPU: ", stderr);
    vfprintf(stderr, format, arguments);
    fputc('\n', stderr);
    va_end(arguments);
}

void unwritten_call(const char *name, char *told, const char *what_it_did) {
    count(COUNT_unwritten_calls);
    if (__atomic_exchange_n(told, 1, __ATOMIC_RELAXED) == 0) say("nobody has written %s: it %s", name, what_it_did);
}

EXPORTED int pretended_gpu_counters(void) { return COUNTER_COUNT; }

EXPORTED const char *pretended_gpu_name(int which) { return names[which]; }

/* Copies the counters; where they are reset the levels stay, and the peak becomes the level. */
EXPORTED void pretended_gpu_counts(uint64_t *copied, int reset) {
    for (int i = 0; i < COUNTER_COUNT; i++) {
        copied[i] = __atomic_load_n(&counters[i], __ATOMIC_RELAXED);
        bool level = i == COUNT_device_bytes || i == COUNT_device_bytes_peak || i == COUNT_host_bytes;
        if (reset && !level) __atomic_store_n(&counters[i], 0, __ATOMIC_RELAXED);
    }
    if (reset) counters[COUNT_device_bytes_peak] = counters[COUNT_device_bytes];
}

/* Writes `bytes` bytes of `from` to device memory: 0, or 1 where they do not lie in one allocation. */
EXPORTED int pretended_gpu_fill(void *to, const void *from, size_t bytes) {
    struct range range = range_of(to);
    if (range.place != DEVICE || (uintptr_t)to + bytes > range.begin + range.bytes) return 1;
    memcpy(to, from, bytes);
    return 0;
}
