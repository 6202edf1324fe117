// A memory-model litmus suite for Linux threads. Intel SDM vol. 3, "Memory Ordering" and "Locked Atomic Operations".
//
// Each ordering test is a few instructions for each of 2 to 4 threads on variables of their own cache lines. The
// threads run through an array of instances at the same time, and afterwards each instance is looked at: an outcome
// that the processor's ordering forbids must never be there. Outcomes that it allows but that no order of the instructions
// explains are counted too: they show that the threads really met.
//
// Usage: litmus MILLISECONDS CPUS. One line for each test; the status is 1 where anything forbidden was seen.
#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

enum { INSTANCES = 4096, THREADS = 4, LINE = 64 };

// One run of one test: two variables, and up to two results of each thread.
struct instance {
    _Alignas(LINE) volatile uint64_t x;
    _Alignas(LINE) volatile uint64_t y;
    _Alignas(LINE) uint64_t r[THREADS][2];
    _Alignas(LINE) _Atomic int met;
};

static struct instance *instances;

#define STORE(place, value) asm volatile("movq %1, %0" : "=m"(place) : "ri"((uint64_t)(value)) : "memory")
#define LOAD(place) ({ uint64_t v_; asm volatile("movq %1, %0" : "=r"(v_) : "m"(place) : "memory"); v_; })
#define MFENCE() asm volatile("mfence" ::: "memory")
#define XCHG(place, value)                                                                        \
    ({ uint64_t v_ = (value); asm volatile("xchgq %0, %1" : "+r"(v_), "+m"(place) :: "memory"); v_; })
#define LOCKED() asm volatile("lock; addq $0, -8(%%rsp)" ::: "memory", "cc")
#define XADD(place, value)                                                                        \
    ({ uint64_t v_ = (value); asm volatile("lock; xaddq %0, %1" : "+r"(v_), "+m"(place) :: "memory", "cc"); v_; })
#define CPUID()                                                                                   \
    ({ uint32_t a_ = 0, b_, c_ = 0, d_; asm volatile("cpuid" : "+a"(a_), "=b"(b_), "+c"(c_), "=d"(d_) :: "memory"); })

typedef void body(struct instance *);

#define BODY(name) static void name(struct instance *i)

// Store buffering, bare and with everything that drains the store buffer.
BODY(sb0) { STORE(i->x, 1); i->r[0][0] = LOAD(i->y); }
BODY(sb1) { STORE(i->y, 1); i->r[1][0] = LOAD(i->x); }
BODY(sb_fence0) { STORE(i->x, 1); MFENCE(); i->r[0][0] = LOAD(i->y); }
BODY(sb_fence1) { STORE(i->y, 1); MFENCE(); i->r[1][0] = LOAD(i->x); }
BODY(sb_xchg0) { XCHG(i->x, 1); i->r[0][0] = LOAD(i->y); }
BODY(sb_xchg1) { XCHG(i->y, 1); i->r[1][0] = LOAD(i->x); }
BODY(sb_lock0) { STORE(i->x, 1); LOCKED(); i->r[0][0] = LOAD(i->y); }
BODY(sb_lock1) { STORE(i->y, 1); LOCKED(); i->r[1][0] = LOAD(i->x); }
BODY(sb_xadd0) { XADD(i->x, 1); i->r[0][0] = LOAD(i->y); }
BODY(sb_xadd1) { XADD(i->y, 1); i->r[1][0] = LOAD(i->x); }
BODY(sb_cpuid0) { STORE(i->x, 1); CPUID(); i->r[0][0] = LOAD(i->y); }
BODY(sb_cpuid1) { STORE(i->y, 1); CPUID(); i->r[1][0] = LOAD(i->x); }
static int both_zero(struct instance *i) { return i->r[0][0] == 0 && i->r[1][0] == 0; }

// Message passing.
BODY(mp0) { STORE(i->x, 1); STORE(i->y, 1); }
BODY(mp1) { i->r[1][0] = LOAD(i->y); i->r[1][1] = LOAD(i->x); }
static int late_message(struct instance *i) { return i->r[1][0] == 1 && i->r[1][1] == 0; }

// The same with all kinds of instructions for stores and loads: a push, a string store, a read-modify-write.
BODY(mp_kinds0) {
    uint64_t value = 1, count = 1;
    volatile uint64_t *to = &i->x;
    asm volatile("rep; stosq" : "+D"(to), "+c"(count) : "a"(value) : "memory");
    asm volatile("orq $1, %0" : "+m"(i->y) :: "memory", "cc");
}
BODY(mp_kinds1) {
    uint64_t first = 0, second;
    asm volatile("addq %1, %0" : "+r"(first) : "m"(i->y) : "memory", "cc");
    asm volatile("pushq %1; popq %0" : "=r"(second) : "r"(LOAD(i->x)) : "memory");
    i->r[1][0] = first;
    i->r[1][1] = second;
}
// Through vector registers.
BODY(mp_vector0) {
    asm volatile("movq %2, %%xmm0; movq %%xmm0, %0; movq %%xmm0, %1"
                 : "=m"(i->x), "=m"(i->y) : "r"(1ull) : "memory", "xmm0");
}
BODY(mp_vector1) {
    asm volatile("movq %2, %%xmm0; movq %3, %%xmm1; movq %%xmm0, %0; movq %%xmm1, %1"
                 : "=r"(i->r[1][0]), "=r"(i->r[1][1]) : "m"(i->y), "m"(i->x) : "memory", "xmm0", "xmm1");
}

// Load buffering.
BODY(lb0) { i->r[0][0] = LOAD(i->x); STORE(i->y, 1); }
BODY(lb1) { i->r[1][0] = LOAD(i->y); STORE(i->x, 1); }
static int both_one(struct instance *i) { return i->r[0][0] == 1 && i->r[1][0] == 1; }

// Independent reads of independent writes.
BODY(write_x) { STORE(i->x, 1); }
BODY(write_y) { STORE(i->y, 1); }
BODY(iriw2) { i->r[2][0] = LOAD(i->x); i->r[2][1] = LOAD(i->y); }
BODY(iriw3) { i->r[3][0] = LOAD(i->y); i->r[3][1] = LOAD(i->x); }
static int two_orders(struct instance *i) {
    return i->r[2][0] == 1 && i->r[2][1] == 0 && i->r[3][0] == 1 && i->r[3][1] == 0;
}

// Causality through a third thread.
BODY(wrc1) { uint64_t seen = LOAD(i->x); i->r[1][0] = seen; STORE(i->y, seen); }
BODY(wrc2) { i->r[2][0] = LOAD(i->y); i->r[2][1] = LOAD(i->x); }
static int lost_cause(struct instance *i) { return i->r[2][0] == 1 && i->r[2][1] == 0; }

// R and S.
BODY(r0) { STORE(i->x, 1); STORE(i->y, 1); }
BODY(r1) { STORE(i->y, 2); i->r[1][0] = LOAD(i->x); }
BODY(r_fence1) { STORE(i->y, 2); MFENCE(); i->r[1][0] = LOAD(i->x); }
static int overtaken(struct instance *i) { return i->y == 2 && i->r[1][0] == 0; }
BODY(s0) { STORE(i->x, 2); STORE(i->y, 1); }
BODY(s1) { i->r[1][0] = LOAD(i->y); STORE(i->x, 1); }
static int undone(struct instance *i) { return i->r[1][0] == 1 && i->x == 2; }

// 2+2W.
BODY(ww0) { STORE(i->x, 1); STORE(i->y, 2); }
BODY(ww1) { STORE(i->y, 1); STORE(i->x, 2); }
static int both_first(struct instance *i) { return i->x == 1 && i->y == 1; }

// n6: a thread sees its own store before the others do. Allowed.
BODY(n6_0) { STORE(i->x, 1); i->r[0][0] = LOAD(i->x); i->r[0][1] = LOAD(i->y); }
BODY(n6_1) { STORE(i->y, 2); STORE(i->x, 2); }
static int forwarded(struct instance *i) { return i->r[0][0] == 1 && i->r[0][1] == 0 && i->x == 1; }

// n5: each sees the other's store after its own.
BODY(n5_0) { STORE(i->x, 1); i->r[0][0] = LOAD(i->x); }
BODY(n5_1) { STORE(i->x, 2); i->r[1][0] = LOAD(i->x); }
static int crossed(struct instance *i) { return i->r[0][0] == 2 && i->r[1][0] == 1; }

// n4: each sees the other's store before its own.
BODY(n4_0) { i->r[0][0] = LOAD(i->x); STORE(i->x, 1); }
BODY(n4_1) { i->r[1][0] = LOAD(i->x); STORE(i->x, 2); }

// Coherence of two loads.
BODY(corr1) { i->r[1][0] = LOAD(i->x); i->r[1][1] = LOAD(i->x); }
static int backwards(struct instance *i) { return i->r[1][0] == 1 && i->r[1][1] == 0; }

struct ordering {
    const char *name;
    int threads;
    body *bodies[THREADS];
    int (*looks_for)(struct instance *);
    int forbidden;
};

static const struct ordering ORDERINGS[] = {
    {"SB", 2, {sb0, sb1}, both_zero, 0},
    {"SB+mfence", 2, {sb_fence0, sb_fence1}, both_zero, 1},
    {"SB+xchg", 2, {sb_xchg0, sb_xchg1}, both_zero, 1},
    {"SB+lock", 2, {sb_lock0, sb_lock1}, both_zero, 1},
    {"SB+xadd", 2, {sb_xadd0, sb_xadd1}, both_zero, 1},
    {"SB+cpuid", 2, {sb_cpuid0, sb_cpuid1}, both_zero, 1},
    {"SB+mfence+lock", 2, {sb_fence0, sb_lock1}, both_zero, 1},
    {"MP", 2, {mp0, mp1}, late_message, 1},
    {"MP+kinds", 2, {mp_kinds0, mp_kinds1}, late_message, 1},
    {"MP+vector", 2, {mp_vector0, mp_vector1}, late_message, 1},
    {"LB", 2, {lb0, lb1}, both_one, 1},
    {"R", 2, {r0, r1}, overtaken, 0},
    {"R+mfence", 2, {r0, r_fence1}, overtaken, 1},
    {"S", 2, {s0, s1}, undone, 1},
    {"2+2W", 2, {ww0, ww1}, both_first, 1},
    {"n6", 2, {n6_0, n6_1}, forwarded, 0},
    {"n5", 2, {n5_0, n5_1}, crossed, 1},
    {"n4", 2, {n4_0, n4_1}, crossed, 1},
    {"CoRR", 2, {write_x, corr1}, backwards, 1},
    {"WRC", 3, {write_x, wrc1, wrc2}, lost_cause, 1},
    {"IRIW", 4, {write_x, write_y, iriw2, iriw3}, two_orders, 1},
};

static int cpus;
static _Atomic int gate, arrived, over;
static const struct ordering *current;

static void on_cpu(int thread) {
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(thread % cpus, &set);
    sched_setaffinity(0, sizeof set, &set);
}

static void await(_Atomic int *word, int value) {
    for (int spins = 0; atomic_load(word) != value; spins++) {
        if (spins > 200) {
            sched_yield();
        }
    }
}

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * 1e3 + time.tv_nsec / 1e6;
}

// Waits at an instance until all threads are there. One that is not running now is not waited for.
static void meet(struct instance *instance, int threads) {
    atomic_fetch_add(&instance->met, 1);
    for (int spins = 0; spins < 400 && atomic_load_explicit(&instance->met, memory_order_relaxed) < threads; spins++) {
    }
}

// Every thread runs each instance once. They meet at each, or start at different ones and meet on the way.
static void *run_all(void *argument) {
    int me = (int)(intptr_t)argument;
    on_cpu(me);
    for (int round = 1;; round++) {
        await(&gate, round);
        if (atomic_load(&over)) {
            return NULL;
        }
        body *run = current->bodies[me];
        int meets = round % 4 != 0, from = meets ? 0 : round / 4 * (me + 1) % 16;
        for (int n = 0; n < INSTANCES; n++) {
            struct instance *instance = &instances[(n + from) % INSTANCES];
            if (meets) {
                meet(instance, current->threads);
            }
            run(instance);
        }
        atomic_fetch_add(&arrived, 1);
    }
}

static int order_is_kept(const struct ordering *test, double milliseconds) {
    pthread_t threads[THREADS];
    uint64_t runs = 0, seen = 0;
    double end = now() + milliseconds;
    current = test;
    atomic_store(&over, 0);
    atomic_store(&gate, 0);
    for (int n = 0; n < test->threads; n++) {
        pthread_create(&threads[n], NULL, run_all, (void *)(intptr_t)n);
    }
    for (int round = 1;; round++) {
        memset(instances, 0, INSTANCES * sizeof *instances);
        atomic_store(&arrived, 0);
        int last = round > 2 && now() > end;
        atomic_store(&over, last);
        atomic_store(&gate, round);
        if (last) {
            break;
        }
        await(&arrived, test->threads);
        for (int n = 0; n < INSTANCES; n++) {
            seen += test->looks_for(&instances[n]);
        }
        runs += INSTANCES;
    }
    for (int n = 0; n < test->threads; n++) {
        pthread_join(threads[n], NULL);
    }
    int wrong = test->forbidden && seen != 0;
    printf("%-16s %10llu runs, %s %llu\n", test->name, (unsigned long long)runs,
           test->forbidden ? "forbidden" : "reordered", (unsigned long long)seen);
    return wrong;
}

// Atomicity. Each thread changes or looks at the same bytes for a while; afterwards `total` is what was added.

static char *bytes;
static _Atomic uint64_t added, torn;
static double deadline;

#define WHILE_TIME for (uint64_t n_ = 0; (n_ & 15) || now() < deadline; n_++)

static void add_locked(char *at, int size) {
    uint64_t mine = 0;
    WHILE_TIME {
        switch (size) {
        case 2: asm volatile("lock; incw %0" : "+m"(*(volatile uint16_t *)at) :: "memory", "cc"); break;
        case 4: asm volatile("lock; addl $1, %0" : "+m"(*(volatile uint32_t *)at) :: "memory", "cc"); break;
        default: XADD(*(volatile uint64_t *)at, 1); break;
        }
        mine++;
    }
    atomic_fetch_add(&added, mine);
}

static int exchange_16(char *at, uint64_t expected[2], uint64_t low, uint64_t high) {
    unsigned char done;
    asm volatile("lock; cmpxchg16b %1; setz %0"
                 : "=q"(done), "+m"(*(volatile __int128 *)at), "+a"(expected[0]), "+d"(expected[1])
                 : "b"(low), "c"(high) : "memory", "cc");
    return done;
}

static void add_16(char *at) {
    uint64_t mine = 0, seen[2] = {0, 0};
    WHILE_TIME {
        if (seen[0] != ~seen[1] && (seen[0] | seen[1])) {
            atomic_fetch_add(&torn, 1);
        }
        if (exchange_16(at, seen, seen[0] + 1, ~(seen[0] + 1))) {
            mine++;
            seen[0]++;
            seen[1] = ~seen[0];
        }
    }
    atomic_fetch_add(&added, mine);
}

// Stores all zeros and all ones in turn; the others must see nothing else.
static void flip(char *at, int size, int writer) {
    uint64_t value = 0;
    WHILE_TIME {
        if (writer) {
            value = ~value;
            switch (size) {
            case 2: asm volatile("movw %w1, %0" : "=m"(*(volatile uint16_t *)at) : "r"(value) : "memory"); break;
            case 4: asm volatile("movl %k1, %0" : "=m"(*(volatile uint32_t *)at) : "r"(value) : "memory"); break;
            case 8: asm volatile("movq %1, %0" : "=m"(*(volatile uint64_t *)at) : "r"(value) : "memory"); break;
            default:
                asm volatile("movq %1, %%xmm0; punpcklqdq %%xmm0, %%xmm0; movdqa %%xmm0, %0"
                             : "=m"(*(volatile __int128 *)at) : "r"(value) : "memory", "xmm0");
            }
            continue;
        }
        uint64_t low = 0, high = 0, ones = ~0ull;
        switch (size) {
        case 2: asm volatile("movzwl %1, %k0" : "=r"(low) : "m"(*(volatile uint16_t *)at) : "memory"); ones = 0xffff; break;
        case 4: asm volatile("movl %1, %k0" : "=r"(low) : "m"(*(volatile uint32_t *)at) : "memory"); ones = 0xffffffff; break;
        case 8: asm volatile("movq %1, %0" : "=r"(low) : "m"(*(volatile uint64_t *)at) : "memory"); break;
        default:
            asm volatile("movdqa %2, %%xmm0; movq %%xmm0, %0; psrldq $8, %%xmm0; movq %%xmm0, %1"
                         : "=r"(low), "=r"(high) : "m"(*(volatile __int128 *)at) : "memory", "xmm0");
            if (high != low) {
                atomic_fetch_add(&torn, 1);
            }
        }
        if (low != 0 && low != ones) {
            atomic_fetch_add(&torn, 1);
        }
    }
}

enum kind { ADD, ADD_16, FLIP };
struct atomicity {
    const char *name;
    enum kind kind;
    int size, offset;
};

// Offsets into three pages, of which the second and third lie elsewhere in the machine's memory than the first.
static const struct atomicity ATOMICITIES[] = {
    {"lock inc", ADD, 2, 64},
    {"lock add", ADD, 4, 64},
    {"lock xadd", ADD, 8, 64},
    {"misaligned lock", ADD, 8, 64 + 3},
    {"split lock, 2", ADD, 2, 128 - 1},
    {"split lock, 4", ADD, 4, 128 - 3},
    {"split lock, 8", ADD, 8, 128 - 5},
    {"page lock, 2", ADD, 2, 4096 - 1},
    {"page lock, 4", ADD, 4, 4096 - 2},
    {"page lock, 8", ADD, 8, 4096 - 3},
    {"page lock, 8", ADD, 8, 8192 - 1},
    {"cmpxchg16b", ADD_16, 16, 256},
    {"store 2", FLIP, 2, 64 + 1},
    {"store 4", FLIP, 4, 64 + 57},
    {"store 8", FLIP, 8, 64 + 51},
    {"store 8", FLIP, 8, 64},
    {"store 16", FLIP, 16, 320},
};

static const struct atomicity *present;

static void *run_atomicity(void *argument) {
    int me = (int)(intptr_t)argument;
    char *at = bytes + present->offset;
    on_cpu(me);
    atomic_fetch_add(&arrived, 1);
    await(&gate, 1);
    switch (present->kind) {
    case ADD: add_locked(at, present->size); break;
    case ADD_16: add_16(at); break;
    case FLIP: flip(at, present->size, me == 0); break;
    }
    return NULL;
}

static int is_atomic(const struct atomicity *test, double milliseconds) {
    pthread_t threads[THREADS];
    int count = cpus < 2 ? 2 : cpus > THREADS ? THREADS : cpus;
    memset(bytes, 0, 3 * 4096);
    present = test;
    atomic_store(&added, 0);
    atomic_store(&torn, 0);
    atomic_store(&gate, 0);
    atomic_store(&arrived, 0);
    for (int n = 0; n < count; n++) {
        pthread_create(&threads[n], NULL, run_atomicity, (void *)(intptr_t)n);
    }
    await(&arrived, count);
    deadline = now() + milliseconds;
    atomic_store(&gate, 1);
    for (int n = 0; n < count; n++) {
        pthread_join(threads[n], NULL);
    }
    uint64_t sum = 0, mask = test->size >= 8 ? ~0ull : (1ull << 8 * test->size) - 1;
    memcpy(&sum, bytes + test->offset, test->size > 8 ? 8 : test->size);
    uint64_t lost = test->kind == FLIP ? 0 : (atomic_load(&added) - sum) & mask;
    printf("%-16s %10llu added, lost %llu, torn %llu\n", test->name, (unsigned long long)atomic_load(&added),
           (unsigned long long)lost, (unsigned long long)atomic_load(&torn));
    return lost != 0 || atomic_load(&torn) != 0;
}

// Three pages in a row that are not neighbours in the file that backs them, nor then in the machine's memory.
static char *scattered(void) {
    int file = memfd_create("pages", 0);
    if (file < 0 || ftruncate(file, 64 * 4096)) {
        exit(2);
    }
    char *all = mmap(NULL, 64 * 4096, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    memset(all, 1, 64 * 4096);
    static const int order[3] = {40, 7, 23};
    for (int n = 0; n < 3; n++) {
        void *at = mmap(all + n * 4096, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, file, order[n] * 4096);
        if (at == MAP_FAILED) {
            exit(2);
        }
    }
    return all;
}

int main(int count, char **arguments) {
    double milliseconds = count > 1 ? atof(arguments[1]) : 200;
    cpus = count > 2 ? atoi(arguments[2]) : 2;
    instances = aligned_alloc(4096, INSTANCES * sizeof *instances);
    bytes = scattered();
    int wrong = 0;
    setvbuf(stdout, NULL, _IOLBF, 0);
    for (size_t n = 0; n < sizeof ORDERINGS / sizeof *ORDERINGS; n++) {
        wrong |= order_is_kept(&ORDERINGS[n], milliseconds);
    }
    for (size_t n = 0; n < sizeof ATOMICITIES / sizeof *ATOMICITIES; n++) {
        wrong |= is_atomic(&ATOMICITIES[n], milliseconds);
    }
    puts(wrong ? "wrong" : "right");
    return wrong;
}
