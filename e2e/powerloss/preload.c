/* Records what a program asks of a disk: every write, change of length, new name and sync below one directory.
 *
 *     cc -shared -fPIC -O2 -o preload.so preload.c -ldl
 *     IONIAN_TRACE_ROOT=/state/data IONIAN_TRACE_FILE=/elsewhere/trace LD_PRELOAD=$PWD/preload.so ionian serve ...
 *
 * Many threads and processes append to one trace: a record is one write to a file that was opened for appending. Each
 * has two times, from before and from after the call, of a clock that all of them share; src/trace.rs reads it and
 * says what the fields mean. What the replay could not understand (a shared writable mapping, a copy inside the
 * kernel, a file that is opened for synchronous writes) is recorded as such, so that it fails and does not guess.
 *
 * Programs that make system calls past the C library are not seen. The replay finds out: in the end its disk must equal
 * the real one.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum operation {
    OP_WRITE = 1,
    OP_TRUNCATE = 2,
    OP_SYNC = 3,
    OP_CREATE = 4,
    OP_MKDIR = 5,
    OP_RENAME = 6,
    OP_LINK = 7,
    OP_UNLINK = 8,
    OP_RMDIR = 9,
    OP_UNKNOWN = 10,
};

#define MAGIC 0x4c574f50u

struct header {
    uint32_t magic, operation;
    uint64_t begun, ended, inode, number;
    uint32_t path_length, path2_length, data_length, unused;
};

/* High, so that no program counts on it being free, and below the usual limit of 1,024. */
#define TRACE_DESCRIPTOR 900

static int trace = -1;
static char root[PATH_MAX];
static size_t root_length;

static uint64_t now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (uint64_t)time.tv_sec * 1000000000u + (uint64_t)time.tv_nsec;
}

__attribute__((constructor)) static void begin(void) {
    const char *file = getenv("IONIAN_TRACE_FILE"), *directory = getenv("IONIAN_TRACE_ROOT");
    if (!file || !directory || !realpath(directory, root)) return;
    root_length = strlen(root);
    int opened = (int)syscall(SYS_openat, AT_FDCWD, file, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0600);
    if (opened < 0) return;
    trace = fcntl(opened, F_DUPFD_CLOEXEC, TRACE_DESCRIPTOR);
    syscall(SYS_close, opened);
}

/* Everything below the root, but not the memory that processes share about a database: SQLite makes it anew. */
static int is_watched(const char *path) {
    size_t length = strlen(path);
    if (trace < 0 || strncmp(path, root, root_length) || (path[root_length] != '/' && path[root_length])) return 0;
    return length < 4 || strcmp(path + length - 4, "-shm");
}

static int path_of(int descriptor, char *path) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = readlink(link, path, PATH_MAX - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return 1;
}

/* The absolute path of a name that was given relative to a directory. */
static int resolve(int directory, const char *name, char *path) {
    if (!name) return 0;
    if (name[0] == '/') return snprintf(path, PATH_MAX, "%s", name) < PATH_MAX;
    char base[PATH_MAX];
    if (directory == AT_FDCWD) {
        if (!getcwd(base, sizeof base)) return 0;
    } else if (!path_of(directory, base)) {
        return 0;
    }
    return snprintf(path, PATH_MAX, "%s/%s", base, name) < PATH_MAX;
}

static void put(enum operation operation, uint64_t begun, uint64_t inode, uint64_t number, const char *path,
                const char *path2, const void *data, size_t length) {
    int kept = errno;
    struct header header = {
        .magic = MAGIC,
        .operation = operation,
        .begun = begun,
        .ended = now(),
        .inode = inode,
        .number = number,
        .path_length = (uint32_t)strlen(path),
        .path2_length = (uint32_t)strlen(path2),
        .data_length = (uint32_t)length,
    };
    struct iovec parts[] = {
        {&header, sizeof header},
        {(void *)path, header.path_length},
        {(void *)path2, header.path2_length},
        {(void *)data, length},
    };
    size_t whole = sizeof header + header.path_length + header.path2_length + length;
    if (syscall(SYS_writev, trace, parts, 4) != (long)whole) abort();
    errno = kept;
}

static uint64_t inode_of(int descriptor) {
    struct stat status;
    return fstat(descriptor, &status) ? 0 : (uint64_t)status.st_ino;
}

static uint64_t inode_at(const char *path) {
    struct stat status;
    return lstat(path, &status) ? 0 : (uint64_t)status.st_ino;
}

#define REAL(type, name, ...)                                     \
    static type (*real)(__VA_ARGS__);                             \
    if (!real) real = (type(*)(__VA_ARGS__))dlsym(RTLD_NEXT, name)

/* A watched regular file behind a descriptor. */
static int is_watched_file(int descriptor, char *path) {
    if (trace < 0 || descriptor == trace) return 0;
    return path_of(descriptor, path) && is_watched(path);
}

static void unknown(uint64_t begun, int descriptor, const char *what) {
    char path[PATH_MAX];
    int kept = errno;
    if (is_watched_file(descriptor, path)) put(OP_UNKNOWN, begun, inode_of(descriptor), 0, path, what, "", 0);
    errno = kept;
}

/* Writes */

static void wrote(uint64_t begun, int descriptor, const void *data, ssize_t length, off_t offset) {
    char path[PATH_MAX];
    int kept = errno;
    if (length > 0 && is_watched_file(descriptor, path)) {
        if (offset < 0) offset = lseek(descriptor, 0, SEEK_CUR) - length;
        if (offset >= 0) put(OP_WRITE, begun, inode_of(descriptor), (uint64_t)offset, path, "", data, (size_t)length);
    }
    errno = kept;
}

static void wrote_parts(uint64_t begun, int descriptor, const struct iovec *parts, int count, ssize_t length,
                        off_t offset) {
    char path[PATH_MAX];
    int kept = errno;
    if (length > 0 && is_watched_file(descriptor, path)) {
        char *joined = malloc((size_t)length), *end = joined;
        if (!joined) abort();
        for (int part = 0; part < count && end < joined + length; part++) {
            size_t left = (size_t)(joined + length - end);
            size_t size = parts[part].iov_len < left ? parts[part].iov_len : left;
            memcpy(end, parts[part].iov_base, size);
            end += size;
        }
        wrote(begun, descriptor, joined, length, offset);
        free(joined);
    }
    errno = kept;
}

ssize_t write(int descriptor, const void *data, size_t length) {
    REAL(ssize_t, "write", int, const void *, size_t);
    uint64_t begun = now();
    ssize_t done = real(descriptor, data, length);
    if (trace >= 0) wrote(begun, descriptor, data, done, -1);
    return done;
}

ssize_t pwrite64(int descriptor, const void *data, size_t length, off_t offset) {
    REAL(ssize_t, "pwrite64", int, const void *, size_t, off_t);
    uint64_t begun = now();
    ssize_t done = real(descriptor, data, length, offset);
    if (trace >= 0) wrote(begun, descriptor, data, done, offset);
    return done;
}

ssize_t pwrite(int descriptor, const void *data, size_t length, off_t offset) {
    return pwrite64(descriptor, data, length, offset);
}

ssize_t writev(int descriptor, const struct iovec *parts, int count) {
    REAL(ssize_t, "writev", int, const struct iovec *, int);
    uint64_t begun = now();
    ssize_t done = real(descriptor, parts, count);
    if (trace >= 0) wrote_parts(begun, descriptor, parts, count, done, -1);
    return done;
}

ssize_t pwritev64(int descriptor, const struct iovec *parts, int count, off_t offset) {
    REAL(ssize_t, "pwritev64", int, const struct iovec *, int, off_t);
    uint64_t begun = now();
    ssize_t done = real(descriptor, parts, count, offset);
    if (trace >= 0) wrote_parts(begun, descriptor, parts, count, done, offset);
    return done;
}

ssize_t pwritev(int descriptor, const struct iovec *parts, int count, off_t offset) {
    return pwritev64(descriptor, parts, count, offset);
}

int ftruncate64(int descriptor, off_t length) {
    REAL(int, "ftruncate64", int, off_t);
    char path[PATH_MAX];
    uint64_t begun = now();
    int done = real(descriptor, length);
    if (!done && is_watched_file(descriptor, path))
        put(OP_TRUNCATE, begun, inode_of(descriptor), (uint64_t)length, path, "", "", 0);
    return done;
}

int ftruncate(int descriptor, off_t length) { return ftruncate64(descriptor, length); }

int posix_fallocate64(int descriptor, off_t offset, off_t length) {
    REAL(int, "posix_fallocate64", int, off_t, off_t);
    uint64_t begun = now();
    int done = real(descriptor, offset, length);
    unknown(begun, descriptor, "posix_fallocate");
    return done;
}

int posix_fallocate(int descriptor, off_t offset, off_t length) {
    return posix_fallocate64(descriptor, offset, length);
}

int fallocate64(int descriptor, int mode, off_t offset, off_t length) {
    REAL(int, "fallocate64", int, int, off_t, off_t);
    uint64_t begun = now();
    int done = real(descriptor, mode, offset, length);
    unknown(begun, descriptor, "fallocate");
    return done;
}

int fallocate(int descriptor, int mode, off_t offset, off_t length) {
    return fallocate64(descriptor, mode, offset, length);
}

ssize_t copy_file_range(int from, off64_t *from_at, int to, off64_t *to_at, size_t length, unsigned flags) {
    REAL(ssize_t, "copy_file_range", int, off64_t *, int, off64_t *, size_t, unsigned);
    uint64_t begun = now();
    ssize_t done = real(from, from_at, to, to_at, length, flags);
    if (done > 0) unknown(begun, to, "copy_file_range");
    return done;
}

ssize_t sendfile64(int to, int from, off64_t *offset, size_t length) {
    REAL(ssize_t, "sendfile64", int, int, off64_t *, size_t);
    uint64_t begun = now();
    ssize_t done = real(to, from, offset, length);
    if (done > 0) unknown(begun, to, "sendfile");
    return done;
}

ssize_t sendfile(int to, int from, off_t *offset, size_t length) { return sendfile64(to, from, offset, length); }

void *mmap64(void *address, size_t length, int protection, int flags, int descriptor, off_t offset) {
    REAL(void *, "mmap64", void *, size_t, int, int, int, off_t);
    uint64_t begun = now();
    void *mapped = real(address, length, protection, flags, descriptor, offset);
    if (descriptor >= 0 && (protection & PROT_WRITE) && (flags & MAP_TYPE) != MAP_PRIVATE)
        unknown(begun, descriptor, "mmap");
    return mapped;
}

void *mmap(void *address, size_t length, int protection, int flags, int descriptor, off_t offset) {
    return mmap64(address, length, protection, flags, descriptor, offset);
}

/* Syncs. sync_file_range promises nothing after a power cut, and so is not one of them. */

static int synced(const char *name, int descriptor) {
    int (*real)(int) = (int (*)(int))dlsym(RTLD_NEXT, name);
    char path[PATH_MAX];
    uint64_t begun = now();
    int done = real(descriptor);
    if (!done && is_watched_file(descriptor, path))
        put(OP_SYNC, begun, inode_of(descriptor), 0, path, "", "", 0);
    return done;
}

int fsync(int descriptor) { return synced("fsync", descriptor); }

int fdatasync(int descriptor) { return synced("fdatasync", descriptor); }

/* Names */

static void opened(uint64_t begun, int directory, const char *name, int flags, int descriptor) {
    char path[PATH_MAX];
    int kept = errno;
    if (trace >= 0 && descriptor >= 0 && (flags & (O_CREAT | O_TRUNC | O_SYNC | O_DSYNC))
        && (flags & O_TMPFILE) != O_TMPFILE && resolve(directory, name, path) && is_watched(path)) {
        uint64_t inode = inode_of(descriptor);
        if (flags & O_CREAT) put(OP_CREATE, begun, inode, 0, path, "", "", 0);
        if (flags & O_TRUNC) put(OP_TRUNCATE, begun, inode, 0, path, "", "", 0);
        if (flags & (O_SYNC | O_DSYNC)) put(OP_UNKNOWN, begun, inode, 0, path, "O_SYNC", "", 0);
    } else if (descriptor >= 0 && (flags & O_TMPFILE) == O_TMPFILE) {
        unknown(begun, descriptor, "O_TMPFILE");
    }
    errno = kept;
}

int openat64(int directory, const char *name, int flags, ...) {
    REAL(int, "openat64", int, const char *, int, ...);
    mode_t mode = 0;
    if (flags & (O_CREAT | O_TMPFILE)) {
        va_list rest;
        va_start(rest, flags);
        mode = va_arg(rest, mode_t);
        va_end(rest);
    }
    uint64_t begun = now();
    int descriptor = real(directory, name, flags, mode);
    opened(begun, directory, name, flags, descriptor);
    return descriptor;
}

#define FORWARD_MODE                   \
    mode_t mode = 0;                   \
    if (flags & (O_CREAT | O_TMPFILE)) { \
        va_list rest;                  \
        va_start(rest, flags);         \
        mode = va_arg(rest, mode_t);   \
        va_end(rest);                  \
    }

int openat(int directory, const char *name, int flags, ...) {
    FORWARD_MODE
    return openat64(directory, name, flags, mode);
}

int open64(const char *name, int flags, ...) {
    FORWARD_MODE
    return openat64(AT_FDCWD, name, flags, mode);
}

int open(const char *name, int flags, ...) {
    FORWARD_MODE
    return openat64(AT_FDCWD, name, flags, mode);
}

int creat64(const char *name, mode_t mode) {
    return openat64(AT_FDCWD, name, O_CREAT | O_WRONLY | O_TRUNC, mode);
}

int creat(const char *name, mode_t mode) { return creat64(name, mode); }

int mkdirat(int directory, const char *name, mode_t mode) {
    REAL(int, "mkdirat", int, const char *, mode_t);
    char path[PATH_MAX];
    uint64_t begun = now();
    int done = real(directory, name, mode);
    if (!done && resolve(directory, name, path) && is_watched(path))
        put(OP_MKDIR, begun, inode_at(path), 0, path, "", "", 0);
    return done;
}

int mkdir(const char *name, mode_t mode) { return mkdirat(AT_FDCWD, name, mode); }

static void two_names(enum operation operation, uint64_t begun, int from, const char *old, int to, const char *new) {
    char path[PATH_MAX], path2[PATH_MAX];
    int kept = errno;
    if (resolve(from, old, path) && resolve(to, new, path2) && (is_watched(path) || is_watched(path2)))
        put(operation, begun, inode_at(path2), 0, path, path2, "", 0);
    errno = kept;
}

int renameat2(int from, const char *old, int to, const char *new, unsigned flags) {
    REAL(int, "renameat2", int, const char *, int, const char *, unsigned);
    uint64_t begun = now();
    int done = real(from, old, to, new, flags);
    if (!done) two_names(flags & ~RENAME_NOREPLACE ? OP_UNKNOWN : OP_RENAME, begun, from, old, to, new);
    return done;
}

int renameat(int from, const char *old, int to, const char *new) { return renameat2(from, old, to, new, 0); }

int rename(const char *old, const char *new) { return renameat2(AT_FDCWD, old, AT_FDCWD, new, 0); }

int linkat(int from, const char *old, int to, const char *new, int flags) {
    REAL(int, "linkat", int, const char *, int, const char *, int);
    uint64_t begun = now();
    int done = real(from, old, to, new, flags);
    if (!done) two_names(OP_LINK, begun, from, old, to, new);
    return done;
}

int link(const char *old, const char *new) { return linkat(AT_FDCWD, old, AT_FDCWD, new, 0); }

int unlinkat(int directory, const char *name, int flags) {
    REAL(int, "unlinkat", int, const char *, int);
    char path[PATH_MAX];
    int named = trace >= 0 && resolve(directory, name, path) && is_watched(path);
    uint64_t begun = now(), inode = named ? inode_at(path) : 0;
    int done = real(directory, name, flags);
    if (!done && named) put(flags & AT_REMOVEDIR ? OP_RMDIR : OP_UNLINK, begun, inode, 0, path, "", "", 0);
    return done;
}

int unlink(const char *name) { return unlinkat(AT_FDCWD, name, 0); }

int rmdir(const char *name) { return unlinkat(AT_FDCWD, name, AT_REMOVEDIR); }

int remove(const char *name) {
    struct stat status;
    if (lstat(name, &status)) return -1;
    return S_ISDIR(status.st_mode) ? rmdir(name) : unlink(name);
}
