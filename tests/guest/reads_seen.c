// What devices write is looked at while they write it:
//   reads_seen DEVICE ROUNDS
// asks for many parts of a block device at a time and, until all are there, sums up over and over what is in memory. The
// sums are of no use but to depend on the instant.
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/aio_abi.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { PARTS = 16, BYTES = 16 << 10, STEP = 512 };

int main(int argc, char **argv) {
    int device = argc > 2 ? open(argv[1], O_RDONLY | O_DIRECT) : -1;
    char *memory = mmap(0, PARTS * BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    aio_context_t context = 0;
    if (device < 0 || memory == MAP_FAILED || syscall(SYS_io_setup, PARTS, &context))
        return 1;
    uint64_t seen = 0, hash = 0;
    for (long round = atol(argv[2]); round > 0; round--) {
        struct iocb parts[PARTS], *list[PARTS];
        memset(memory, 0, PARTS * BYTES);
        memset(parts, 0, sizeof parts);
        for (int part = 0; part < PARTS; part++) {
            parts[part].aio_lio_opcode = IOCB_CMD_PREAD;
            parts[part].aio_fildes = (uint32_t)device;
            parts[part].aio_buf = (uint64_t)(memory + part * BYTES);
            parts[part].aio_nbytes = BYTES;
            parts[part].aio_offset = part * BYTES;
            list[part] = &parts[part];
        }
        if (syscall(SYS_io_submit, context, PARTS, list) != PARTS)
            return 2;
        // Each block of a device that this is run with begins with a byte that is not zero.
        volatile uint64_t *words = (volatile uint64_t *)memory;
        for (int left = 1; left;) {
            left = 0;
            for (long at = 0; at < PARTS * BYTES / 8; at += STEP / 8) {
                uint64_t word = words[at];
                left += !word;
                seen += word * (uint64_t)(at + 1);
            }
        }
        struct io_event events[PARTS];
        for (int got = 0; got < PARTS;) {
            long more = syscall(SYS_io_getevents, context, 1, PARTS, events, 0);
            if (more < 0)
                return 3;
            for (long event = 0; event < more; event++)
                if (events[event].res != BYTES)
                    return 4;
            got += more;
        }
        for (long at = 0; at < PARTS * BYTES / 8; at++)
            hash = hash * 31 + words[at];
    }
    printf("looked at: %lx\n%lx\n", seen, hash);
    return 0;
}
