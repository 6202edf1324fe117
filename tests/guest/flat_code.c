// 32-bit code under a 64-bit kernel, without a C library: plain computing, code that changes itself, signals, segments that are
// not flat, and the same bytes executed as 32-bit and as 64-bit code, by one thread and by several. Each part checks its results
// and prints a line; the status is 1 where one was wrong.
//
// Usage: flat_code SCALE CPUS. Built with `-m32 -O2 -nostdlib -static -ffreestanding`.
typedef unsigned char u8;
typedef unsigned u32;
typedef unsigned long long u64;

enum { PAGE = 4096, RWX = 7, PRIVATE = 0x22, SHARED = 1, CODE32 = 0x23, CODE64 = 0x33, DATA = 0x2b };
enum {
    SYS_EXIT = 1, SYS_WRITE = 4, SYS_FTRUNCATE = 93, SYS_SETITIMER = 104, SYS_CLONE = 120, SYS_MODIFY_LDT = 123,
    SYS_SCHED_YIELD = 158, SYS_RT_SIGACTION = 174, SYS_MMAP2 = 192,
    SYS_SCHED_SETAFFINITY = 241, SYS_SET_THREAD_AREA = 243, SYS_EXIT_GROUP = 252, SYS_CLOCK_GETTIME = 265,
    SYS_MEMFD_CREATE = 356,
};

static int call_system(int number, u32 a, u32 b, u32 c, u32 d, u32 e, u32 f) {
    // The sixth argument is in EBP, which the compiler wants for itself.
    u32 arguments[2] = {a, f};
    int result;
    asm volatile("push %%ebp; mov 4(%%ebx), %%ebp; mov (%%ebx), %%ebx; int $0x80; pop %%ebp"
                 : "=a"(result), "+b"((u32){(u32)arguments})
                 : "0"(number), "c"(b), "d"(c), "S"(d), "D"(e) : "memory");
    return result;
}
#define SYSTEM(number, a, b, c, d) call_system(number, (u32)(a), (u32)(b), (u32)(c), (u32)(d), 0, 0)

// The compiler calls these by itself.
void *memset(void *to, int value, u32 bytes) {
    void *at = to;
    asm volatile("rep stosb" : "+D"(at), "+c"(bytes) : "a"(value) : "memory");
    return to;
}
void *memcpy(void *to, const void *from, u32 bytes) {
    void *at = to;
    asm volatile("rep movsb" : "+D"(at), "+S"(from), "+c"(bytes) :: "memory");
    return to;
}

static char line[256];
static u32 filled;
static void flush(void) {
    SYSTEM(SYS_WRITE, 1, line, filled, 0);
    filled = 0;
}
static void text(const char *from) {
    while (*from && filled < sizeof line) {
        line[filled++] = *from++;
    }
}
static void number(u32 value) {
    char digits[11];
    int at = 10;
    digits[10] = 0;
    do {
        digits[--at] = '0' + value % 10;
    } while (value /= 10);
    text(digits + at);
}

static u32 scale, cpus;
static volatile u32 failures;
static void check(int holds, const char *what, u32 got) {
    if (!holds && failures++ < 20) {
        text("WRONG: ");
        text(what);
        text(": ");
        number(got);
        text("\n");
        flush();
    }
}

static u32 state = 2463534242u;
static u32 rnd(void) {
    state ^= state << 13;
    state ^= state >> 17;
    return state ^= state << 5;
}

static u8 *map(u32 pages, int file) {
    u32 flags = file < 0 ? PRIVATE : SHARED;
    u32 at = call_system(SYS_MMAP2, 0, pages * PAGE, RWX, flags, file, 0);
    check(at < 0xfffff000, "mmap", at);
    return (u8 *)at;
}

// Plain computing.

static u32 rotated(u32 value, int by) {
    return value >> by | value << (32 - by);
}

static void sha256(u32 hash[8], const u8 *data, u32 blocks) {
    static u32 k[64];
    if (!k[0]) {
        // The fractional parts of the cube roots of the first 64 primes.
        int n = 0;
        for (u32 prime = 2; n < 64; prime++) {
            u32 divisor = 2;
            while (divisor * divisor <= prime && prime % divisor) {
                divisor++;
            }
            if (divisor * divisor > prime) {
                long double root = 2;
                for (int step = 0; step < 40; step++) {
                    root -= (root * root * root - prime) / (3 * root * root);
                }
                k[n++] = (u64)(root * 4294967296.0L);
            }
        }
    }
    while (blocks--) {
        u32 w[64], s[8];
        for (int n = 0; n < 16; n++, data += 4) {
            w[n] = __builtin_bswap32(*(const u32 *)data);
        }
        for (int n = 16; n < 64; n++) {
            u32 a = w[n - 15], b = w[n - 2];
            w[n] = w[n - 16] + w[n - 7] + (rotated(a, 7) ^ rotated(a, 18) ^ a >> 3) +
                   (rotated(b, 17) ^ rotated(b, 19) ^ b >> 10);
        }
        memcpy(s, hash, 32);
        for (int n = 0; n < 64; n++) {
            u32 e = s[4], a = s[0];
            u32 one = s[7] + (rotated(e, 6) ^ rotated(e, 11) ^ rotated(e, 25)) + ((e & s[5]) ^ (~e & s[6])) + k[n] + w[n];
            u32 two = (rotated(a, 2) ^ rotated(a, 13) ^ rotated(a, 22)) + ((a & s[1]) ^ (a & s[2]) ^ (s[1] & s[2]));
            for (int m = 7; m > 0; m--) {
                s[m] = s[m - 1];
            }
            s[4] += one;
            s[0] = one + two;
        }
        for (int n = 0; n < 8; n++) {
            hash[n] += s[n];
        }
    }
}

static const u32 FIRST[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};

static void hashes(void) {
    static u8 data[16384];
    u32 hash[8];
    // "abc", padded.
    memset(data, 0, 64);
    memcpy(data, "abc\x80", 4);
    data[63] = 24;
    for (u32 n = 0; n < 40 * scale; n++) {
        memcpy(hash, FIRST, 32);
        sha256(hash, data, 1);
        check(hash[0] == 0xba7816bf && hash[7] == 0xf20015ad, "SHA-256 of abc", hash[0]);
        sha256(hash, data, sizeof data / 64);
    }
}

static void sort(int *from, int *to) {
    while (to - from > 1) {
        int pivot = from[(to - from) / 2], *left = from, *right = to - 1;
        while (left <= right) {
            while (*left < pivot) left++;
            while (*right > pivot) right--;
            if (left <= right) {
                int value = *left;
                *left++ = *right;
                *right-- = value;
            }
        }
        sort(from, right + 1);
        from = left;
    }
}

static void sorts(void) {
    static int numbers[20000];
    for (u32 n = 0; n < 3 * scale; n++) {
        u32 sum = 0;
        for (int at = 0; at < 20000; at++) {
            sum += numbers[at] = rnd();
        }
        sort(numbers, numbers + 20000);
        for (int at = 0; at < 20000; at++) {
            sum -= numbers[at];
            check(at == 0 || numbers[at - 1] <= numbers[at], "order", at);
        }
        check(sum == 0, "sum", sum);
    }
}

static __attribute__((noinline)) u32 fib(u32 n) {
    return n < 2 ? n : fib(n - 1) + fib(n - 2);
}

static void recursion(void) {
    for (u32 n = 0; n < 3 * scale; n++) {
        u32 got = fib(24);
        check(got == 46368, "fib(24)", got);
    }
}

static void sieve(void) {
    static u8 composite[1 << 18];
    for (u32 n = 0; n < 2 * scale; n++) {
        u32 primes = 0;
        memset(composite, 0, sizeof composite);
        for (u32 p = 2; p < 1 << 18; p++) {
            if (!composite[p]) {
                primes++;
                for (u32 q = 2 * p; q < 1 << 18; q += p) {
                    composite[q] = 1;
                }
            }
        }
        check(primes == 23000, "primes below 2^18", primes);
    }
}

static void roots(void) {
    for (u32 n = 1; n < 5000 * scale; n++) {
        long double root;
        double wide = (double)n * n;
        asm("fsqrt" : "=t"(root) : "0"((long double)wide));
        check(root == n, "a root", n);
        asm("sqrtsd %0, %0" : "+x"(wide));
        check(wide == n, "an SSE root", n);
    }
}

// Code that changes.

static u32 call(const void *at, u32 argument) {
    u32 result;
    // The compiler must not think that it knows what is there.
    asm volatile("call *%1" : "=a"(result) : "r"(at), "0"(argument) : "ecx", "edx", "memory", "cc");
    return result;
}

// mov $value, %eax; ret
static void write_constant(u8 *at, u32 value) {
    at[0] = 0xb8;
    *(u32 *)(at + 1) = value;
    at[5] = 0xc3;
}

static void serialize(void) {
    u32 a = 0, c = 0;
    asm volatile("cpuid" : "+a"(a), "+c"(c) :: "ebx", "edx", "memory");
}

static void own_code(void) {
    u8 *code = map(1, -1);
    // mov %eax, next+1; next: mov $0, %eax; ret
    memcpy(code, "\xa3\0\0\0\0\xb8\0\0\0\0\xc3", 11);
    *(u32 *)(code + 1) = (u32)code + 6;
    for (u32 n = 0; n < 2000 * scale; n++) {
        u32 value = rnd(), got = call(code, value);
        check(got == value, "the next instruction", got);
    }
    // mov %eax, %ecx; xor %eax, %eax; l: add $0, %eax; mov %cl, l+2; dec %ecx; jnz l; ret: each round adds what the round
    // before stored.
    memcpy(code, "\x89\xc1\x31\xc0\x83\xc0\0\x88\x0d\0\0\0\0\x49\x75\xf4\xc3", 17);
    *(u32 *)(code + 9) = (u32)code + 6;
    for (u32 n = 0; n < 20 * scale; n++) {
        u32 rounds = 2 + rnd() % 100, sum = rounds * (rounds + 1) / 2 - 1;
        code[6] = 0;
        u32 got = call(code, rounds);
        check(got == sum, "its own loop", got);
    }
    int file = SYSTEM(SYS_MEMFD_CREATE, "code", 0, 0, 0);
    SYSTEM(SYS_FTRUNCATE, file, PAGE, 0, 0);
    u8 *write = map(1, file), *execute = map(1, file);
    for (u32 n = 0; n < 2000 * scale; n++) {
        u32 value = rnd(), at = value % 4000;
        write_constant(write + at, value);
        serialize();
        check(call(execute + at, 0) == value, "through another mapping", at);
    }
}

// Signals.

struct action {
    void *handler;
    u32 flags;
    void *restorer;
    u32 mask[2];
};
static volatile u32 ticks, faults;
static u8 *patched;

static void on_tick(int signal) {
    (void)signal;
    ticks++;
    // A NOP of another form, in code that may be running.
    *(volatile unsigned short *)(patched + 8) = ticks & 1 ? 0x9066 : 0xc089;
}

// Goes on behind the instruction, whose length is in EBX.
static void on_fault(int signal, void *info, u32 *context) {
    (void)signal, (void)info;
    faults++;
    enum { EIP = 19, EBX = 13 };
    context[EIP] += context[EBX];
}

asm("restorer: mov $173, %eax; int $0x80");
extern u8 restorer[];
static void handle(int signal, void *handler) {
    struct action action = {handler, 0x04000004, restorer, {0}};
    check(SYSTEM(SYS_RT_SIGACTION, signal, &action, 0, 8) == 0, "sigaction", signal);
}

static void signals(void) {
    patched = map(1, -1);
    // mov %eax, %ecx; xor %eax, %eax; l: rol $5, %eax; nop; two bytes that the handler changes; add %ecx, %eax; dec %ecx; jnz l
    memcpy(patched, "\x89\xc1\x31\xc0\xc1\xc0\x05\x90\x66\x90\x01\xc8\x49\x75\xf5\xc3", 16);
    u32 rounds = 20000, expected = 0;
    for (u32 n = rounds; n; n--) {
        expected = (expected << 5 | expected >> 27) + n;
    }
    handle(14, on_tick);
    u32 period[4] = {0, 50, 0, 50};
    ticks = 0;
    SYSTEM(SYS_SETITIMER, 0, period, 0, 0);
    for (u32 n = 0; n < 20 * scale || ticks < 20; n++) {
        u32 got = call(patched, rounds);
        check(got == expected, "under signals", got);
    }
    memset(period, 0, sizeof period);
    SYSTEM(SYS_SETITIMER, 0, period, 0, 0);
}

// Segments.

struct segment {
    u32 entry, base, limit, flags;
};
enum { LOCAL = 7, WHOLE = 0x51, LIMITED = 0x41, READ_ONLY = 0x59 };

static void segments(void) {
    static u32 data[1024];
    // Read-only data; data with a limit; all addresses from a base on.
    struct segment all[3] = {
        {0, 0, 0xfffff, READ_ONLY}, {1, (u32)data, sizeof data - 1, LIMITED}, {2, (u32)data, 0xfffff, WHOLE}};
    for (int n = 0; n < 3; n++) {
        check(SYSTEM(SYS_MODIFY_LDT, 1, &all[n], sizeof all[n], 0) == 0, "modify_ldt", n);
    }
    struct segment area = {~0u, (u32)data, 0xfffff, WHOLE};
    check(SYSTEM(SYS_SET_THREAD_AREA, &area, 0, 0, 0) == 0, "set_thread_area", area.entry);
    asm volatile("mov %0, %%gs" :: "r"(area.entry << 3 | 3));
    asm volatile("mov %0, %%fs" :: "r"(2 << 3 | LOCAL));
    handle(11, on_fault);
    for (u32 n = 0; n < 300 * scale; n++) {
        u32 at = rnd() % 1024 * 4, value = rnd(), got, other, limited;
        asm volatile("mov %2, %%gs:(%3); mov %%fs:(%3), %0; mov %%ds:(%4,%3), %1"
                     : "=&r"(got), "=&r"(other) : "r"(value), "r"(at), "r"(data) : "memory");
        check(got == value && other == value, "GS and FS", at);
        // Within the limit, and beyond it.
        u32 before = faults, beyond = n % 4 == 0;
        asm volatile("mov %2, %%es; mov $3, %%ebx; mov $0, %0; es movl (%1), %0; mov %3, %%es"
                     : "=&a"(limited) : "c"(at + (beyond ? PAGE : 0)), "r"(1 << 3 | LOCAL), "r"(DATA) : "ebx", "memory");
        check(faults - before == beyond && limited == (beyond ? 0 : value), "ES with a limit", at);
    }
    // The same loop while DS is flat, and while it may only be read: each of its stores faults then.
    for (u32 n = 0; n < 20 * scale; n++) {
        u32 before = faults, rounds = 50, bad = n % 3 == 0;
        data[0] = 0;
        asm volatile("mov %1, %%ds; mov $2, %%ebx; jmp 1f; .p2align 4; 1: add %%ecx, (%%edx); dec %%ecx; jnz 1b; mov %2, %%ds"
                     : "+c"(rounds) : "a"(bad ? LOCAL : DATA), "S"(DATA), "d"(data) : "ebx", "memory", "cc");
        check(faults - before == (bad ? 50 : 0) && data[0] == (bad ? 0 : 50 * 51 / 2), "DS", data[0]);
    }
    asm volatile("mov %0, %%fs; mov %0, %%gs" :: "r"(0));
}

// The same bytes as 32-bit and as 64-bit code. A far call from 32-bit code comes to `enter`, which calls what EDX points to.

asm("enter: .code64; call *%rdx; lretl; .code32");
extern u8 enter[];

static u32 call_64(const void *at, u32 argument, u32 count) {
    struct __attribute__((packed)) {
        const void *offset;
        unsigned short selector;
    } far = {enter, CODE64};
    u32 result;
    asm volatile("lcall *%1" : "=a"(result), "+m"(far), "+S"(count) : "0"(argument), "d"(at) : "ecx", "memory", "cc");
    return result;
}

static u32 call_32(const void *at, u32 argument, u32 count) {
    u32 result;
    asm volatile("call *%2" : "=a"(result), "+S"(count) : "d"(at), "0"(argument) : "ecx", "memory", "cc");
    return result;
}

static void both(void) {
    u8 *code = map(1, -1);
    // xor %ecx, %ecx; l: inc %eax, nop in 32-bit code, and a NOP with a REX prefix in 64-bit code; add %eax, %ecx; sub $1, %esi;
    // jnz l; mov %ecx, %eax; ret
    memcpy(code, "\x31\xc9\x40\x90\x01\xc1\x83\xee\x01\x75\xf7\x89\xc8\xc3", 14);
    for (u32 n = 0; n < 300 * scale; n++) {
        u32 argument = rnd(), rounds = 1 + rnd() % 60;
        u32 got = call_32(code, argument, rounds);
        check(got == argument * rounds + rounds * (rounds + 1) / 2, "as 32-bit code", got);
        got = call_64(code, argument, rounds);
        check(got == argument * rounds, "as 64-bit code", got);
    }
    // What is patched is patched for both: dec, and another REX prefix.
    code[2] = 0x48;
    serialize();
    for (u32 n = 0; n < 100; n++) {
        u32 got = call_32(code, 1000, 10);
        check(got == 10000 - 55, "patched, as 32-bit code", got);
        got = call_64(code, 1000, 10);
        check(got == 10000, "patched, as 64-bit code", got);
    }
}

// Threads in both kinds of code.

enum { THREADS = 3, CALLS = 20000, STACK = 64 * 1024 };
static u8 *shared;
static volatile u32 generation, finished, ended, wrong, counter;

static void on_cpu(u32 thread) {
    u32 mask = 1 << thread % cpus;
    SYSTEM(SYS_SCHED_SETAFFINITY, 0, sizeof mask, &mask, 0);
}

static void start(void (*run)(u32), u32 argument) {
    u32 *top = (u32 *)(map(STACK / PAGE, -1) + STACK - 64);
    *--top = argument;
    *--top = (u32)run;
    int number = SYS_CLONE;
    asm volatile("int $0x80; test %0, %0; jnz 1f; pop %%eax; call *%%eax; mov $1, %%eax; xor %%ebx, %%ebx; int $0x80; 1:"
                 : "+a"(number) : "b"(0x50f00), "c"(top), "d"(0), "S"(0), "D"(0) : "memory", "cc");
    check(number > 0, "clone", number);
}

static u32 call_either(u32 thread, const void *at, u32 argument) {
    return thread & 1 ? call_64(at, argument, 0) : call_32(at, argument, 0);
}

static void reader(u32 thread) {
    on_cpu(thread);
    u32 bad = 0;
    while (!finished) {
        u32 least = generation;
        bad += call_either(thread, shared, 0) < least;
    }
    for (u32 n = 0; n < CALLS; n++) {
        bad += call_either(thread, shared + 64, (u32)&counter) != 77;
    }
    asm volatile("lock add %1, %0" : "+m"(wrong) : "r"(bad));
    asm volatile("lock incl %0" : "+m"(ended));
}

static void threads(void) {
    enum { SYS_MEMBARRIER = 375, REGISTER = 64, SYNC = 32 };
    if (SYSTEM(SYS_MEMBARRIER, REGISTER, 0, 0, 0)) {
        return;
    }
    shared = map(1, -1);
    write_constant(shared, 0);
    // lock incl (%eax); mov $77, %eax; ret
    memcpy(shared + 64, "\xf0\xff\0\xb8\x4d\0\0\0\xc3", 9);
    generation = finished = ended = wrong = counter = 0;
    on_cpu(0);
    for (u32 n = 1; n <= THREADS; n++) {
        start(reader, n);
    }
    for (u32 n = 1; n <= 100 * scale; n++) {
        // Within an aligned quadword.
        *(volatile u32 *)(shared + 1) = n;
        check(SYSTEM(SYS_MEMBARRIER, SYNC, 0, 0, 0) == 0, "membarrier", n);
        generation = n;
        if (n % 8 == 0) {
            SYSTEM(SYS_SCHED_YIELD, 0, 0, 0, 0);
        }
    }
    finished = 1;
    while (ended != THREADS) {
        SYSTEM(SYS_SCHED_YIELD, 0, 0, 0, 0);
    }
    check(wrong == 0, "old code after a barrier", wrong);
    check(counter == THREADS * CALLS, "locked additions", counter);
}

static u32 milliseconds(void) {
    u32 time[2];
    SYSTEM(SYS_CLOCK_GETTIME, 1, time, 0, 0);
    return time[0] * 1000 + time[1] / 1000000;
}

static void part(const char *name, void (*run)(void)) {
    u32 before = failures, from = milliseconds();
    run();
    u32 took = milliseconds() - from;
    text(name);
    text(failures == before ? " right " : " WRONG ");
    number(took);
    text(" ms\n");
    flush();
}

static u32 parsed(const char *from) {
    u32 value = 0;
    while (*from >= '0' && *from <= '9') {
        value = value * 10 + (*from++ - '0');
    }
    return value ? value : 1;
}

asm(".globl _start; _start: mov %esp, %eax; and $-16, %esp; sub $12, %esp; push %eax; call program");
__attribute__((used, noreturn)) void program(u32 *stack) {
    scale = stack[0] > 1 ? parsed((char *)stack[2]) : 1;
    cpus = stack[0] > 2 ? parsed((char *)stack[3]) : 1;
    part("SHA-256", hashes);
    part("quicksort", sorts);
    part("recursion", recursion);
    part("sieve", sieve);
    part("roots", roots);
    part("its own code", own_code);
    part("signals", signals);
    part("segments", segments);
    part("32-bit and 64-bit code", both);
    part("threads", threads);
    text(failures ? "wrong\n" : "right\n");
    flush();
    for (;;) {
        SYSTEM(SYS_EXIT_GROUP, failures != 0, 0, 0, 0);
    }
}
