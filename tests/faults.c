/* A failing disk and a wrong clock: a library for test_faults.py, which LD_PRELOAD puts before libc.

   Only calls on files below FAULT_UNDER are counted, by kind: open (for writing), write, flush,
   sync, close, rename, unlink, read. TensorFlow writes with fwrite and reads with pread.

   FAULT_FAIL   kinds that fail, separated by commas
   FAULT_ERRNO  the error that they return
   FAULT_AT     the first call of these kinds that fails (1)
   FAULT_TIMES  how many fail (all)
   FAULT_ROOM   bytes that can be written before the disk is full
   FAULT_KILL   kinds before and after which the process can be killed
   FAULT_KILL_AT  at which of these places (2 N - 1 is before the Nth call, 2 N after it)
   FAULT_CLOCK  seconds to add to the time of day */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#define REAL(name) ((__typeof__(&name))real(#name))

static void *real(const char *name) { return dlsym(RTLD_NEXT, name); }

static char under[4096], fails[256], kills[256];
static long error, at, times, room, kill_at, offset, failed, places;

static long number(const char *name, long otherwise) {
    const char *text = getenv(name);
    return text ? atol(text) : otherwise;
}

static void copy(char *target, size_t size, const char *name) {
    const char *text = getenv(name);
    snprintf(target, size, "%s", text ? text : "");
}

/* Read the environment; called by the dynamic linker, and again by a process that was forked. */
__attribute__((constructor)) void fault_begin(void) {
    copy(under, sizeof under, "FAULT_UNDER");
    copy(fails, sizeof fails, "FAULT_FAIL");
    copy(kills, sizeof kills, "FAULT_KILL");
    error = number("FAULT_ERRNO", EIO);
    at = number("FAULT_AT", 1);
    times = number("FAULT_TIMES", 1L << 60);
    room = number("FAULT_ROOM", -1);
    kill_at = number("FAULT_KILL_AT", 0);
    offset = number("FAULT_CLOCK", 0);
    failed = places = 0;
}

static int is_listed(const char *list, const char *kind) {
    size_t length = strlen(kind);
    for (const char *found = list; (found = strstr(found, kind)); found += length)
        if ((found == list || found[-1] == ',') && (!found[length] || found[length] == ','))
            return 1;
    return 0;
}

static int is_path(const char *path) {
    char here[4096], whole[8192];
    if (!*under)
        return 0;
    if (*path != '/' && getcwd(here, sizeof here)) {
        snprintf(whole, sizeof whole, "%s/%s", here, path);
        path = whole;
    }
    return !strncmp(path, under, strlen(under));
}

static int is_file(int fd) {
    char link[64], path[4096];
    if (!*under || fd < 0)
        return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t size = readlink(link, path, sizeof path - 1);
    if (size < 0)
        return 0;
    path[size] = 0;
    return is_path(path);
}

/* Die if the process is to be killed here; called before and after each call. */
static void place(const char *kind) {
    if (is_listed(kills, kind) && ++places == kill_at)
        kill(getpid(), SIGKILL);
}

static int has_failed(const char *kind) {
    if (!is_listed(fails, kind))
        return 0;
    ++failed;
    if (failed < at || failed >= at + times)
        return 0;
    errno = error;
    return 1;
}

/* Return how many of `size` bytes fit on the disk; -1 (and errno) if none. */
static ssize_t fitting(size_t size) {
    if (room < 0 || !size)
        return size;
    if (!room) {
        errno = ENOSPC;
        return -1;
    }
    if ((long)size > room)
        size = room;
    room -= size;
    return size;
}

#define FAULTY(kind, concerns, failure, call)      \
    do {                                           \
        if (!(concerns))                           \
            return call;                           \
        place(kind);                               \
        if (has_failed(kind))                      \
            return failure;                        \
        __typeof__(call) result = call;            \
        int saved = errno;                         \
        place(kind);                               \
        errno = saved;                             \
        return result;                             \
    } while (0)

#define WRITING(flags) ((flags) & (O_WRONLY | O_RDWR | O_CREAT | O_TRUNC))

#define OPEN(name)                                                                         \
    int name(const char *path, int flags, ...) {                                           \
        va_list list;                                                                      \
        va_start(list, flags);                                                             \
        int mode = va_arg(list, int);                                                      \
        va_end(list);                                                                      \
        FAULTY("open", WRITING(flags) && is_path(path), -1, REAL(name)(path, flags, mode)); \
    }
OPEN(open)
OPEN(open64)

#define FOPEN(name)                                                                       \
    FILE *name(const char *path, const char *mode) {                                      \
        FAULTY("open", strpbrk(mode, "wa+") && is_path(path), NULL, REAL(name)(path, mode)); \
    }
FOPEN(fopen)
FOPEN(fopen64)

static ssize_t cut(int fd, const void *data, size_t size) {
    if (!is_file(fd))
        return REAL(write)(fd, data, size);
    ssize_t fits = fitting(size);
    return fits < 0 ? -1 : REAL(write)(fd, data, fits);
}

ssize_t write(int fd, const void *data, size_t size) {
    FAULTY("write", is_file(fd), -1, cut(fd, data, size));
}

static size_t cut_stream(const void *data, size_t size, size_t count, FILE *file) {
    if (!is_file(fileno(file)))
        return REAL(fwrite)(data, size, count, file);
    ssize_t fits = fitting(size * count);
    if (fits <= 0)
        return 0;
    size_t written = REAL(fwrite)(data, 1, fits, file);
    if (written == (size_t)fits && (size_t)fits < size * count)
        errno = ENOSPC;
    return written / size;
}

size_t fwrite(const void *data, size_t size, size_t count, FILE *file) {
    if (!size || !count)
        return 0;
    FAULTY("write", is_file(fileno(file)), 0, cut_stream(data, size, count, file));
}

int ftruncate(int fd, off_t size) {
    FAULTY("write", is_file(fd), -1, REAL(ftruncate)(fd, size));
}
int ftruncate64(int fd, off64_t size) {
    FAULTY("write", is_file(fd), -1, REAL(ftruncate64)(fd, size));
}

ssize_t sendfile(int out, int in, off_t *offset_in, size_t size) {
    FAULTY("write", is_file(out), -1, REAL(sendfile)(out, in, offset_in, size));
}

int fflush(FILE *file) {
    FAULTY("flush", file && is_file(fileno(file)), EOF, REAL(fflush)(file));
}

int fsync(int fd) { FAULTY("sync", is_file(fd), -1, REAL(fsync)(fd)); }

/* A file that fails to close is closed nevertheless. */
static int close_badly(int fd) {
    REAL(close)(fd);
    errno = error;
    return -1;
}
int close(int fd) { FAULTY("close", is_file(fd), close_badly(fd), REAL(close)(fd)); }

static int fclose_badly(FILE *file) {
    REAL(fclose)(file);
    errno = error;
    return EOF;
}
int fclose(FILE *file) {
    FAULTY("close", is_file(fileno(file)), fclose_badly(file), REAL(fclose)(file));
}

int rename(const char *old, const char *new) {
    FAULTY("rename", is_path(new), -1, REAL(rename)(old, new));
}

int unlink(const char *path) { FAULTY("unlink", is_path(path), -1, REAL(unlink)(path)); }

ssize_t read(int fd, void *data, size_t size) {
    FAULTY("read", is_file(fd), -1, REAL(read)(fd, data, size));
}
ssize_t pread(int fd, void *data, size_t size, off_t from) {
    FAULTY("read", is_file(fd), -1, REAL(pread)(fd, data, size, from));
}
ssize_t pread64(int fd, void *data, size_t size, off64_t from) {
    FAULTY("read", is_file(fd), -1, REAL(pread64)(fd, data, size, from));
}

int clock_gettime(clockid_t which, struct timespec *now) {
    int result = REAL(clock_gettime)(which, now);
    if (which == CLOCK_REALTIME)
        now->tv_sec += offset;
    return result;
}
int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    int result = REAL(gettimeofday)(now, zone);
    now->tv_sec += offset;
    return result;
}
time_t time(time_t *now) {
    time_t result = REAL(time)(NULL) + offset;
    if (now)
        *now = result;
    return result;
}
