/* Two threads, each with work of its own. */
#include "workload.h"

#include <pthread.h>

static void *count_steps(void *from)
{
    uint64_t steps = 0, first = (uintptr_t)from;
    for (uint64_t n = first; n < first + 100000; n++)
        for (uint64_t value = n; value > 1; steps++)
            value = value & 1 ? 3 * value + 1 : value >> 1;
    return (void *)(uintptr_t)steps;
}

uint64_t threads(void)
{
    pthread_t both[2];
    uint64_t sum = 0;
    for (uintptr_t i = 0; i < 2; i++)
        if (pthread_create(&both[i], NULL, count_steps, (void *)(i * 1000000 + 1)))
            fail("pthread_create");
    for (int i = 0; i < 2; i++) {
        void *steps;
        if (pthread_join(both[i], &steps))
            fail("pthread_join");
        sum = mix(sum, (uintptr_t)steps);
    }
    return sum;
}
