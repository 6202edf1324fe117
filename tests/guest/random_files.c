// Random operations on files, the same for a seed: prints the outcome of each, which is the same on any file system.
//   random_files FOLDER SEED COUNT [9p|lists]
// With "9p" what its clients cannot do is left out; with "lists" there are access control lists, and no devices. Some
// operations are done as other users than root.
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <ftw.h>
#include <grp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/wait.h>
#include <sys/xattr.h>
#include <unistd.h>

enum { FILES = 6, SPAN = 1 << 18 };

static uint64_t state;
static int is_9p, has_lists;
static int files[FILES];
static char data[SPAN];

static uint32_t below(uint32_t end) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (state >> 33) % end;
}

static int seldom(uint32_t times) { return below(times) == 0; }

static const char *const FOLDERS[] = {".", "d", "e", "d/s"};
static const char *const NAMES[] = {"a", "b", "c", "d", "e", "s"};

static const char *path(void) {
    static char paths[4][64];
    static int next;
    char *to = paths[next++ % 4];
    if (seldom(6))
        snprintf(to, sizeof paths[0], "%s", FOLDERS[below(4)]);
    else
        snprintf(to, sizeof paths[0], "%s/%s", FOLDERS[below(4)], NAMES[below(6)]);
    return to;
}

static unsigned sum(const char *bytes, long len) {
    unsigned sum = 1;
    for (long i = 0; i < len; i++)
        sum = sum * 31 + (unsigned char)bytes[i];
    return sum;
}

static void outcome(long result) {
    if (result < 0)
        printf(" = %s", strerrorname_np(errno));
    else
        printf(" = %ld", result);
}

static void attributes(const struct stat *s) {
    int folder = S_ISDIR(s->st_mode);
    printf(" [%o %d:%d", s->st_mode, s->st_uid, s->st_gid);
    if (!folder)
        printf(" links %ld size %ld", (long)s->st_nlink, (long)s->st_size);
    if (S_ISCHR(s->st_mode) || S_ISBLK(s->st_mode))
        printf(" device %d:%d", major(s->st_rdev), minor(s->st_rdev));
    printf("]");
}

static void show(const char *name) {
    struct stat s;
    if (lstat(name, &s))
        outcome(-1);
    else
        attributes(&s);
}

static int by_name(const void *a, const void *b) { return strcmp(*(char **)a, *(char **)b); }

static void list(const char *name) {
    DIR *folder = opendir(name);
    char *names[64];
    int count = 0;
    printf("list %s", name);
    if (!folder) {
        outcome(-1);
        return;
    }
    for (struct dirent *entry; count < 64 && (entry = readdir(folder));) {
        char text[300];
        snprintf(text, sizeof text, "%s:%d", entry->d_name, entry->d_type);
        names[count++] = strdup(text);
    }
    closedir(folder);
    qsort(names, count, sizeof *names, by_name);
    for (int i = 0; i < count; i++) {
        printf(" %s", names[i]);
        free(names[i]);
    }
}

static void open_one(void) {
    static const int WAYS[] = {O_RDONLY, O_WRONLY, O_RDWR, O_RDWR};
    int slot = below(FILES), flags = WAYS[below(4)] | O_NONBLOCK, mode = below(01000);
    if (below(3))
        flags |= O_CREAT;
    if (seldom(4))
        flags |= O_TRUNC;
    if (seldom(4))
        flags |= O_EXCL;
    if (seldom(4))
        flags |= O_APPEND;
    if (seldom(8))
        flags |= O_NOFOLLOW;
    if (seldom(12))
        flags |= O_DIRECTORY;
    // What comes of a pipe that nobody reads is not the file system's; of O_DIRECTORY with O_CREAT, the kernel's age's.
    if (flags & O_DIRECTORY)
        flags &= ~O_CREAT;
    const char *name = path();
    struct stat s;
    if (!lstat(name, &s) && (S_ISFIFO(s.st_mode) || S_ISCHR(s.st_mode) || S_ISBLK(s.st_mode)))
        flags |= O_CREAT | O_EXCL;
    if (files[slot] >= 0)
        close(files[slot]);
    files[slot] = open(name, flags, mode);
    printf("open %s %o %o", name, flags, mode);
    outcome(files[slot] < 0 ? -1 : 0);
    if (files[slot] >= 0 && !fstat(files[slot], &s))
        attributes(&s);
}

static void unnamed(void) {
    const char *name = path(), *to = path();
    int fd = open(name, O_TMPFILE | O_RDWR | (seldom(3) ? O_EXCL : 0), 0640);
    printf("unnamed %s", name);
    outcome(fd < 0 ? -1 : 0);
    if (fd < 0)
        return;
    char link[64];
    struct stat s;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    printf(" write");
    outcome(write(fd, data, 1000));
    printf(" link %s", to);
    outcome(linkat(AT_FDCWD, link, AT_FDCWD, to, AT_SYMLINK_FOLLOW));
    if (!fstat(fd, &s))
        attributes(&s);
    close(fd);
}

static void contents(int fd) {
    long offset = below(SPAN / 2), len = seldom(4) ? below(SPAN / 2) : below(5000);
    switch (below(9)) {
    case 0:
        printf("read %ld", len);
        long got = read(fd, data, len);
        outcome(got);
        printf(" sum %u", got > 0 ? sum(data, got) : 0);
        break;
    case 1: {
        long got = pread(fd, data, len, offset);
        printf("pread %ld at %ld", len, offset);
        outcome(got);
        printf(" sum %u", got > 0 ? sum(data, got) : 0);
        break;
    }
    case 2:
    case 3:
        memset(data, below(256), len);
        printf("pwrite %ld at %ld", len, offset);
        outcome(pwrite(fd, data, len, offset));
        break;
    case 4:
        memset(data, below(256), len);
        printf("write %ld", len);
        outcome(write(fd, data, len));
        break;
    case 5:
        printf("ftruncate %ld", offset);
        outcome(ftruncate(fd, offset));
        break;
    case 6: {
        struct stat s;
        // Only a whole page that there is: behind the file's end is a signal.
        if (fstat(fd, &s) || s.st_size < 4096 || !S_ISREG(s.st_mode)) {
            printf("no map");
            break;
        }
        long at = below(s.st_size / 4096) * 4096;
        int writes = !seldom(3);
        char *map = mmap(0, 4096, PROT_READ | (writes ? PROT_WRITE : 0), writes ? MAP_SHARED : MAP_PRIVATE, fd, at);
        printf("map %ld", at);
        outcome(map == MAP_FAILED ? -1 : 0);
        if (map == MAP_FAILED)
            break;
        printf(" sum %u", sum(map, 4096));
        if (writes)
            memset(map + below(2048), below(256), below(2048));
        if (writes)
            msync(map, 4096, MS_SYNC);
        munmap(map, 4096);
        break;
    }
    case 7: {
        struct stat s;
        // Where a folder ends is the file system's to say.
        if (fstat(fd, &s) || S_ISDIR(s.st_mode))
            break;
        off_t end = lseek(fd, 0, SEEK_END);
        printf("seek");
        outcome(end);
        outcome(lseek(fd, below(10000), SEEK_SET));
        break;
    }
    default: {
        struct stat s;
        printf("fstat");
        if (fstat(fd, &s))
            outcome(-1);
        else
            attributes(&s);
        fsync(fd);
    }
    }
}

static void space(int fd) {
    static const int MODES[] = {0, FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                                FALLOC_FL_ZERO_RANGE, FALLOC_FL_PUNCH_HOLE};
    int mode = MODES[below(5)], other = files[below(FILES)];
    long offset = below(SPAN / 2), len = below(20000);
    if (seldom(2)) {
        printf("fallocate %d %ld %ld", mode, offset, len);
        outcome(fallocate(fd, mode, offset, len));
        return;
    }
    loff_t from = offset, to = below(SPAN / 2);
    long done = 0, more = 0;
    while (done < len && (more = copy_file_range(fd, &from, other, &to, len - done, 0)) > 0)
        done += more;
    printf("copy %ld from %ld, %ld", len, offset, done);
    outcome(more < 0 ? -1 : 0);
}

static void names(void) {
    const char *one = path(), *two = path();
    switch (below(10)) {
    case 0:
        printf("mkdir %s", one);
        outcome(mkdir(one, below(4) ? 0755 : below(010000)));
        break;
    case 1:
        printf("rmdir %s", one);
        outcome(rmdir(one));
        break;
    case 2:
        printf("unlink %s", one);
        outcome(unlink(one));
        break;
    case 3:
    case 4: {
        struct stat from, to;
        // Linux's client of 9P does not know that both names are of one file.
        if (is_9p && !lstat(one, &from) && !lstat(two, &to) && from.st_ino == to.st_ino)
            return;
        printf("rename %s %s", one, two);
        outcome(rename(one, two));
        break;
    }
    case 5: {
        int flags = is_9p ? 0 : below(4);
        printf("renameat2 %s %s %d", one, two, flags);
        outcome(renameat2(AT_FDCWD, one, AT_FDCWD, two, flags));
        break;
    }
    case 6:
        printf("link %s %s", one, two);
        outcome(link(one, two));
        break;
    case 7: {
        char text[64] = {0};
        printf("symlink %s %s", one, two);
        outcome(symlink(one, two));
        outcome(readlink(two, text, sizeof text - 1));
        printf(" %s", text);
        break;
    }
    case 8: {
        static const mode_t KINDS[] = {S_IFREG, S_IFIFO, S_IFSOCK, S_IFCHR, S_IFBLK, 0};
        mode_t mode = KINDS[below(6)] | below(010000);
        // What is a file on the host has no list.
        if (has_lists && (S_ISCHR(mode) || S_ISBLK(mode)))
            mode = S_IFREG | (mode & 07777);
        printf("mknod %s %o", one, mode);
        outcome(mknod(one, mode, makedev(1 + below(3000), below(70000))));
        break;
    }
    default:
        list(one);
        return;
    }
    show(two);
    show(one);
}

static void owners(void) {
    const char *name = path();
    switch (below(7)) {
    case 0: {
        mode_t mode = below(010000);
        printf("chmod %s %o", name, mode);
        outcome(chmod(name, mode));
        break;
    }
    case 1: {
        int uid = (int)below(4) - 1, gid = (int)below(4) - 1;
        uid = uid > 0 ? 1000 + uid : uid;
        struct stat s;
        // Not for links, pipes and sockets: the host may be unable to have them belong to others.
        // Nor of none, where that takes a program's privileges: Linux's FUSE asks nobody whether it may.
        if (!lstat(name, &s) && ((!S_ISREG(s.st_mode) && !S_ISDIR(s.st_mode)) ||
                                 (uid < 0 && gid < 0 && s.st_mode & (S_ISUID | S_ISGID))))
            return;
        printf("chown %s %d %d", name, uid, gid);
        outcome(lchown(name, uid, gid));
        break;
    }
    case 2: {
        struct timespec times[2] = {{below(2000000000), 0}, {below(2000000000), 0}};
        struct stat s;
        printf("utimens %s", name);
        int set = utimensat(AT_FDCWD, name, times, AT_SYMLINK_NOFOLLOW);
        outcome(set);
        if (!set && !lstat(name, &s))
            printf(" times %ld %ld", (long)s.st_atim.tv_sec, (long)s.st_mtim.tv_sec);
        break;
    }
    case 3: {
        long len = below(SPAN / 2);
        printf("truncate %s %ld", name, len);
        outcome(truncate(name, len));
        break;
    }
    case 4: {
        int mask = below(8);
        printf("access %s %d", name, mask);
        outcome(access(name, mask));
        return;
    }
    default: {
        static const char *const ATTRIBUTES[] = {"user.a", "user.b", "trusted.c", "user.", "none"};
        const char *attribute = ATTRIBUTES[below(5)];
        char value[300], all[500];
        long len = below(300);
        int flags = below(3);
        // Over 9P this is to remove it.
        if (is_9p && flags == XATTR_REPLACE)
            len++;
        struct stat s;
        // The host has no place for those of links, pipes and sockets.
        if (attribute[0] == 't' && (lstat(name, &s) || (!S_ISREG(s.st_mode) && !S_ISDIR(s.st_mode))))
            attribute = "user.a";
        memset(value, 'v', sizeof value);
        printf("xattr %s %s", name, attribute);
        if (below(2))
            outcome(lsetxattr(name, attribute, value, len, flags));
        else if (seldom(3))
            outcome(lremovexattr(name, attribute));
        long got = lgetxattr(name, attribute, value, seldom(3) ? 10 : sizeof value);
        outcome(got);
        got = llistxattr(name, all, sizeof all);
        // Security modules of either side may have some of their own.
        int own = 0;
        for (long at = 0; at < got; at += strlen(all + at) + 1)
            own += !strncmp(all + at, "user.", 5) || !strncmp(all + at, "trusted.", 8);
        printf(" %d", own);
        return;
    }
    }
    show(name);
}

static char *entry(char *at, int tag, int id) {
    uint16_t half[] = {(uint16_t)tag, (uint16_t)below(8)};
    uint32_t number = (uint32_t)id;
    memcpy(at, half, 4);
    memcpy(at + 4, &number, 4);
    return at + 8;
}

// An access control list of a file, or of what is made in a folder.
static void lists(void) {
    static const char *const KINDS[] = {"system.posix_acl_access", "system.posix_acl_default"};
    const char *name = path(), *kind = KINDS[below(2)];
    char list[128] = {2}, *end = list + 4;
    struct stat s;
    if (lstat(name, &s) || (!S_ISREG(s.st_mode) && !S_ISDIR(s.st_mode)))
        return;
    // The owner, named users, the group, named groups, the mask, others: in this order, or it is none.
    int users = below(3), groups = below(3);
    end = entry(end, 1, -1);
    for (int user = 0; user < users; user++)
        end = entry(end, 2, 1000 + user);
    if (!seldom(12))
        end = entry(end, 4, -1);
    for (int group = 0; group < groups; group++)
        end = entry(end, 8, 1 + group);
    if (users + groups ? !seldom(12) : seldom(3))
        end = entry(end, 16, -1);
    end = entry(end, 32, -1);
    printf("%s %s %d %d", kind + 17, name, users, groups);
    if (seldom(4))
        outcome(lremovexattr(name, kind));
    else
        outcome(lsetxattr(name, kind, list, end - list, 0));
    for (int which = 0; which < 2; which++) {
        long got = lgetxattr(name, KINDS[which], list, sizeof list);
        outcome(got);
        printf(" sum %u", got > 0 ? sum(list, got) : 0);
    }
    show(name);
}

static void locks(int fd) {
    struct flock lock = {.l_type = (short)below(3), .l_start = below(100), .l_len = below(50)};
    // For Linux's client of 9P both are of one kind.
    if (is_9p)
        lock.l_type = F_UNLCK;
    printf("lock %d", lock.l_type);
    outcome(fcntl(fd, F_SETLK, &lock));
    printf(" flock");
    outcome(flock(fd, (below(2) ? LOCK_SH : LOCK_EX) | LOCK_NB));
    flock(fd, LOCK_UN);
}

// One operation on names or owners as somebody else.
static void as_other(void) {
    int uid = 1000 + below(3), group = 1 + below(2), more = below(2);
    printf("as %d:%d%s ", uid, group, more ? "+2" : "");
    fflush(stdout);
    pid_t child = fork();
    if (child == 0) {
        gid_t groups[] = {2};
        if (setgroups(more, groups) || setresgid(group, group, group) || setresuid(uid, uid, uid))
            _exit(1);
        switch (below(has_lists ? 5 : 4)) {
        case 0:
            open_one();
            break;
        case 1:
            owners();
            break;
        case 4:
            lists();
            break;
        default:
            names();
        }
        fflush(stdout);
        _exit(0);
    }
    int status;
    waitpid(child, &status, 0);
    if (status)
        printf("ended with %x", status);
    // The child's numbers are not ours.
    below(2);
}

static int remove_one(const char *name, const struct stat *s, int kind, struct FTW *at) {
    (void)s, (void)kind;
    return at->level && remove(name);
}

// Begins anew: the folders are there, and nothing else.
static void begin(void) {
    printf("begin");
    outcome(nftw(".", remove_one, 16, FTW_DEPTH | FTW_PHYS));
    umask(0);
    outcome(mkdir("d", below(2) ? 0777 : 01777));
    outcome(mkdir("e", below(2) ? 02775 : 0755));
    outcome(mkdir("d/s", 0777));
    outcome(chown("e", 1001, 1));
    list(".");
    umask(seldom(2) ? 022 : 0);
    printf("\n");
}

int main(int argc, char **argv) {
    if (argc < 4 || chdir(argv[1]))
        return 1;
    setvbuf(stdout, 0, _IOFBF, 1 << 16);
    state = strtoull(argv[2], 0, 0);
    is_9p = argc > 4 && !strcmp(argv[4], "9p");
    has_lists = argc > 4 && !strcmp(argv[4], "lists");
    for (int i = 0; i < FILES; i++)
        files[i] = -1;
    for (long number = atol(argv[3]), step = 1; step <= number; step++) {
        if (step % 100 == 1)
            begin();
        int fd = files[below(FILES)];
        printf("%ld ", step);
        switch (below(has_lists ? 15 : 12)) {
        case 0:
        case 1:
            open_one();
            break;
        case 2:
        case 3:
        case 4:
            contents(fd);
            break;
        case 5:
            if (is_9p)
                contents(fd);
            else
                space(fd);
            break;
        case 6:
        case 7:
            names();
            break;
        case 8:
            owners();
            break;
        case 9:
            if (seldom(3))
                locks(fd);
            else if (!is_9p)
                unnamed();
            break;
        case 12:
        case 13:
        case 14:
            lists();
            break;
        default:
            as_other();
        }
        printf("\n");
    }
    fflush(stdout);
    return 0;
}
