/* A function's parts in the threads of torch: those of the OpenMP library that torch has loaded. A library of our own
   would have threads of its own, which wait, as busily, for the same cores. */

#include "common.h"

/* Of GNU's OpenMP library, and of LLVM's, which has the same names (libgomp/libgomp_g.h). */
typedef void Parallel(void (*body)(void *), void *data, unsigned threads, unsigned flags);
typedef int Number(void);

typedef struct {
    Task *task;
    const void *arguments;
    Number *number, *count;
} Work;

static void one_part(void *data) {
    const Work *work = data;
    work->task(work->arguments, work->number(), work->count());
}

/* Runs `task` in `threads` threads, which come from `parallel`; `number` and `count` tell a thread which it is of how
   many: there may be fewer than were asked for. */
void fastft_in_threads(Task *task, const void *arguments, unsigned threads, Parallel *parallel, Number *number,
                       Number *count) {
    Work work = {task, arguments, number, count};
    parallel(one_part, &work, threads, 0);
}
