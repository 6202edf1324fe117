// What programs do with files, on the folder in argv[1]: prints the outcome of each step, the same on any file system.
// Steps that a client of 9P cannot do are left out with "9p" as argv[2].
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/sysmacros.h>
#include <sys/wait.h>
#include <sys/xattr.h>
#include <unistd.h>

#define CHECK(call) report(#call, (long)(call))

static void report(const char *what, long result) {
    if (result < 0)
        printf("%s: %s\n", what, strerrorname_np(errno));
    else
        printf("%s: %ld\n", what, result);
}

static void show(const char *name) {
    struct stat s;
    if (lstat(name, &s)) {
        report(name, -1);
        return;
    }
    printf("%s: mode %o, links %ld, owner %d:%d, size %ld, rdev %d:%d\n", name, s.st_mode,
           S_ISDIR(s.st_mode) ? 0L : (long)s.st_nlink, s.st_uid, s.st_gid, S_ISDIR(s.st_mode) ? 0L : (long)s.st_size,
           major(s.st_rdev), minor(s.st_rdev));
}

static unsigned sum(int fd) {
    unsigned char buffer[5000];
    unsigned sum = 1;
    off_t at = 0;
    for (ssize_t n; (n = pread(fd, buffer, sizeof buffer, at)) > 0; at += n)
        for (ssize_t i = 0; i < n; i++)
            sum = sum * 31 + buffer[i];
    return sum;
}

static int count(const char *name) {
    DIR *folder = opendir(name);
    int count = 0;
    while (folder && readdir(folder))
        count++;
    if (folder)
        closedir(folder);
    return count;
}

static void contents(void) {
    int fd = open("data", O_RDWR | O_CREAT | O_EXCL, 0640);
    CHECK(open("data", O_RDWR | O_CREAT | O_EXCL, 0640));
    CHECK(write(fd, "0123456789", 10));
    CHECK(pwrite(fd, "AB", 2, 4));
    CHECK(pwrite(fd, "end", 3, 3000000));
    printf("sum %u\n", sum(fd));
    show("data");
    CHECK(ftruncate(fd, 7));
    CHECK(ftruncate(fd, 70000));
    printf("sum %u\n", sum(fd));
    CHECK(truncate("data", 5));
    CHECK(truncate("data", -1));
    printf("sum %u\n", sum(fd));
    int append = open("data", O_WRONLY | O_APPEND);
    CHECK(write(append, "more", 4));
    CHECK(write(append, "more", 4));
    CHECK(pwrite(append, "x", 1, 0) >= 0);
    CHECK(close(append));
    char *big = malloc(3 << 20);
    for (int i = 0; i < 3 << 20; i++)
        big[i] = i * 2654435761u >> 13;
    CHECK(pwrite(fd, big, 3 << 20, 123));
    printf("sum %u\n", sum(fd));
    CHECK(fsync(fd));
    CHECK(fdatasync(fd));
    CHECK(lseek(fd, -3, SEEK_END));
    CHECK(lseek(fd, -5, SEEK_SET));
    CHECK(close(fd));
    CHECK(open("data", O_RDONLY | O_DIRECTORY));
    fd = open("data", O_RDWR | O_TRUNC);
    show("data");
    CHECK(read(fd, big, 10));
    CHECK(close(fd));
    fd = open("data", O_RDONLY);
    CHECK(write(fd, "x", 1));
    CHECK(close(fd));
    free(big);
}

static void holes(void) {
    int fd = open("holes", O_RDWR | O_CREAT, 0644);
    CHECK(pwrite(fd, "x", 1, 1 << 20));
    CHECK(lseek(fd, 0, SEEK_DATA));
    CHECK(lseek(fd, 1 << 20, SEEK_HOLE));
    CHECK(lseek(fd, 2 << 20, SEEK_DATA));
    CHECK(fallocate(fd, 0, 0, 3 << 20));
    show("holes");
    CHECK(fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 1 << 20, 4096));
    CHECK(fallocate(fd, FALLOC_FL_KEEP_SIZE, 8 << 20, 4096));
    CHECK(fallocate(fd, 0, 0, 0));
    printf("sum %u\n", sum(fd));
    int to = open("copied", O_RDWR | O_CREAT, 0644);
    loff_t from = 1 << 19, into = 5;
    long done = 0, more;
    pwrite(fd, "copy me", 7, 1 << 19);
    while (done < 1 << 19 && (more = copy_file_range(fd, &from, to, &into, (1 << 19) - done, 0)) > 0)
        done += more;
    printf("copied %ld, sum %u\n", done, sum(to));
    CHECK(close(to));
    CHECK(close(fd));
}

static void mapped(int shared) {
    int fd = open("mapped", O_RDWR | O_CREAT, 0644);
    CHECK(ftruncate(fd, 10000));
    CHECK(pwrite(fd, "file", 4, 5000));
    char *private = mmap(0, 10000, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 0);
    printf("private %.4s\n", private + 5000);
    memcpy(private + 5000, "mine", 4);
    if (shared) {
        char *map = mmap(0, 10000, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
        memcpy(map + 6000, "through the map", 15);
        CHECK(msync(map, 10000, MS_SYNC));
        CHECK(munmap(map, 10000));
    }
    printf("sum %u\n", sum(fd));
    CHECK(close(fd));
}

static void names(void) {
    char longest[300], path[400];
    memset(longest, 'n', sizeof longest);
    longest[255] = 0;
    CHECK(mkdir("names", 0755));
    const char *list[] = {" ", "-", "new\nline", "tab\t", "\xff\xfe", "ä€", "a'b\"c", "*", "...", longest};
    for (unsigned i = 0; i < sizeof list / sizeof *list; i++) {
        snprintf(path, sizeof path, "names/%s", list[i]);
        int fd = open(path, O_RDWR | O_CREAT | O_EXCL, 0600);
        CHECK(fd >= 0);
        close(fd);
        CHECK(access(path, R_OK));
    }
    CHECK(count("names"));
    longest[255] = 'n';
    longest[256] = 0;
    snprintf(path, sizeof path, "names/%s", longest);
    CHECK(open(path, O_RDWR | O_CREAT, 0600));
    CHECK(mkdir("names", 0755));
    CHECK(rmdir("names"));
    CHECK(unlink("names"));
    CHECK(rmdir("nothing"));
    CHECK(unlink("nothing"));
    CHECK(mkdir("no/thing", 0755));
    CHECK(open("data/x", O_RDONLY));
}

static void moves(void) {
    CHECK(mkdir("one", 0700));
    CHECK(mkdir("one/below", 0700));
    CHECK(close(open("one/f", O_CREAT | O_WRONLY, 0600)));
    CHECK(close(open("g", O_CREAT | O_WRONLY, 0644)));
    CHECK(rename("one/f", "g"));
    show("g");
    CHECK(rename("one/f", "g"));
    CHECK(rename("one", "one/below/x"));
    CHECK(rename("one", "two"));
    CHECK(rename("g", "two/below/g"));
    CHECK(rename("two/below", "two"));
    CHECK(rename("two/below/g", "two"));
    CHECK(link("two/below/g", "hard"));
    CHECK(link("two/below/g", "hard"));
    CHECK(link("two", "folder"));
    show("hard");
    CHECK(unlink("two/below/g"));
    show("hard");
    CHECK(symlink("two/below", "link"));
    CHECK(symlink("/etc", "absolute"));
    CHECK(symlink("round", "round"));
    show("link");
    char text[100] = {0};
    CHECK(readlink("absolute", text, sizeof text));
    CHECK(close(open("link/through", O_CREAT | O_WRONLY, 0644)));
    show("two/below/through");
    CHECK(open("round", O_RDONLY));
    CHECK(open("link", O_RDONLY | O_NOFOLLOW));
    CHECK(readlink("hard", text, sizeof text));
    CHECK(rmdir("two/below"));
    CHECK(unlink("link/through"));
    CHECK(rmdir("two/below"));
    CHECK(rmdir("two"));
    CHECK(chdir(".."));
}

static void unlinked(void) {
    int fd = open("gone", O_RDWR | O_CREAT, 0600);
    struct stat s;
    CHECK(write(fd, "still here", 10));
    CHECK(unlink("gone"));
    CHECK(fstat(fd, &s));
    printf("size %ld, links %ld\n", (long)s.st_size, (long)s.st_nlink);
    CHECK(ftruncate(fd, 5));
    CHECK(write(fd, "!", 1));
    printf("sum %u\n", sum(fd));
    CHECK(fchmod(fd, 0644));
    CHECK(close(fd));
    CHECK(access("gone", F_OK));
}

static void owners(int seconds_only) {
    CHECK(close(open("own", O_RDWR | O_CREAT, 0666)));
    CHECK(chmod("own", 0751));
    CHECK(chown("own", 1000, 100));
    show("own");
    CHECK(chmod("own", 06755));
    show("own");
    CHECK(chown("own", 0, -1));
    show("own");
    CHECK(chmod("own", 0));
    show("own");
    CHECK(mkdir("group", 02770));
    CHECK(chown("group", 5, 50));
    CHECK(chmod("group", 03770));
    show("group");
    CHECK(mknod("pipe", S_IFIFO | 0622, 0));
    CHECK(mknod("null", S_IFCHR | 0666, makedev(1, 3)));
    CHECK(mknod("socket", S_IFSOCK | 0600, 0));
    show("pipe");
    show("null");
    show("socket");
    // Clients of 9P know whole seconds since 1970.
    struct timespec times[2] = {{1, seconds_only ? 0 : 5}, {2000000000, seconds_only ? 0 : 999999999}};
    struct stat s;
    CHECK(utimensat(AT_FDCWD, "own", times, 0));
    CHECK(stat("own", &s));
    printf("times %ld.%ld %ld.%ld\n", s.st_atim.tv_sec, s.st_atim.tv_nsec, s.st_mtim.tv_sec, s.st_mtim.tv_nsec);
    times[0].tv_nsec = UTIME_OMIT;
    times[1] = seconds_only ? (struct timespec){7, 0} : (struct timespec){-5, 1};
    CHECK(utimensat(AT_FDCWD, "own", times, 0));
    CHECK(stat("own", &s));
    printf("times %ld.%ld %ld.%ld\n", s.st_atim.tv_sec, s.st_atim.tv_nsec, s.st_mtim.tv_sec, s.st_mtim.tv_nsec);
    struct statvfs v;
    CHECK(statvfs(".", &v));
    printf("names of %ld\n", (long)v.f_namemax);
}

static void attributes(void) {
    char value[100], list[200];
    CHECK(close(open("attributes", O_RDWR | O_CREAT, 0644)));
    CHECK(setxattr("attributes", "user.a", "value", 5, 0));
    CHECK(setxattr("attributes", "user.a", "value", 5, XATTR_CREATE));
    CHECK(setxattr("attributes", "user.b", "value", 5, XATTR_REPLACE));
    CHECK(getxattr("attributes", "user.a", value, 0));
    CHECK(getxattr("attributes", "user.a", value, 2));
    CHECK(getxattr("attributes", "user.a", value, 100));
    CHECK(getxattr("attributes", "user.none", value, 100));
    CHECK(listxattr("attributes", list, sizeof list));
    CHECK(removexattr("attributes", "user.a"));
    CHECK(removexattr("attributes", "user.a"));
    CHECK(listxattr("attributes", list, sizeof list));
}

static void locks(void) {
    int one = open("lock", O_RDWR | O_CREAT, 0644);
    struct flock whole = {.l_type = F_WRLCK}, part = {.l_type = F_WRLCK, .l_start = 10, .l_len = 5};
    CHECK(fcntl(one, F_SETLK, &part));
    fflush(stdout);
    if (fork() == 0) {
        int two = open("lock", O_RDWR);
        CHECK(fcntl(two, F_SETLK, &whole));
        CHECK(fcntl(two, F_GETLK, &whole));
        printf("held %d from %ld, %ld bytes\n", whole.l_type, (long)whole.l_start, (long)whole.l_len);
        struct flock other = {.l_type = F_WRLCK, .l_start = 15};
        CHECK(fcntl(two, F_SETLK, &other));
        fflush(stdout);
        _exit(0);
    }
    wait(0);
    fflush(stdout);
    pid_t waiter = fork();
    if (waiter == 0) {
        int two = open("lock", O_RDWR);
        whole.l_type = F_WRLCK;
        int taken = fcntl(two, F_SETLKW, &whole);
        usleep(300000);
        report("a lock that was waited for", taken);
        fflush(stdout);
        _exit(0);
    }
    usleep(200000);
    puts("unlocking");
    fflush(stdout);
    part.l_type = F_UNLCK;
    CHECK(fcntl(one, F_SETLK, &part));
    fflush(stdout);
    waitpid(waiter, 0, 0);
    CHECK(flock(one, LOCK_EX | LOCK_NB));
    fflush(stdout);
    if (fork() == 0) {
        int two = open("lock", O_RDWR);
        CHECK(flock(two, LOCK_SH | LOCK_NB));
        fflush(stdout);
        _exit(0);
    }
    wait(0);
    CHECK(flock(one, LOCK_UN));
    CHECK(close(one));
}

// A folder is listed while files come and go: those that stay are seen once.
static void listing(void) {
    char path[100];
    CHECK(mkdir("many", 0755));
    for (int i = 0; i < 400; i++) {
        snprintf(path, sizeof path, "many/stay%d", i);
        close(open(path, O_CREAT | O_WRONLY, 0644));
        snprintf(path, sizeof path, "many/go%d", i);
        close(open(path, O_CREAT | O_WRONLY, 0644));
    }
    DIR *folder = opendir("many");
    int seen[400] = {0}, number, step = 0;
    for (struct dirent *entry; (entry = readdir(folder)); step++) {
        if (sscanf(entry->d_name, "stay%d", &number) == 1)
            seen[number]++;
        if (step < 400) {
            snprintf(path, sizeof path, "many/go%d", step);
            unlink(path);
            snprintf(path, sizeof path, "many/come%d", step);
            close(open(path, O_CREAT | O_WRONLY, 0644));
        }
    }
    closedir(folder);
    int once = 0;
    for (int i = 0; i < 400; i++)
        once += seen[i] == 1;
    printf("%d of 400 seen once, %d there\n", once, count("many"));
}

int main(int argc, char **argv) {
    setvbuf(stdout, 0, _IOFBF, 1 << 16);
    umask(022);
    int is_9p = argc > 2;
    if (argc < 2 || chdir(argv[1]))
        return 1;
    contents();
    if (!is_9p)
        holes();
    mapped(!is_9p);
    names();
    unlinked();
    owners(is_9p);
    attributes();
    fflush(stdout);
    locks();
    listing();
    moves();
    fflush(stdout);
    return 0;
}
