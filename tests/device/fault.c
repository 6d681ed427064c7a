/* A file system that stops: the n-th change in the folder of FAULT_FOLDER kills the process, before or in the middle of
   the call, or fails from there on. Preloaded by test_crashes.py. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>

enum { OFF, KILL, TEAR, FULL };
static int mode = OFF, left = 0, count = 0;

void arm(int new_mode, int n) { mode = new_mode; left = n; count = 0; }
int counted(void) { return count; }

static int inside(const char *path) {
    const char *folder = getenv("FAULT_FOLDER");
    return folder && !strncmp(path, folder, strlen(folder));
}

static int ours(int fd) {
    char name[64], path[4096];
    snprintf(name, sizeof name, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(name, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return inside(path);
}

/* whether this call is the one, or after it where the disk is full */
static int now(void) {
    if (mode == OFF) return 0;
    count++;
    if (mode == FULL) return count >= left;
    return count == left;
}

#define REAL(name) static __typeof__(name) *real; if (!real) real = dlsym(RTLD_NEXT, #name)
#define STOP(fallback) do { if (mode == FULL) { errno = ENOSPC; return -1; } fallback; kill(getpid(), SIGKILL); } while (0)

ssize_t pwrite64(int fd, const void *data, size_t size, off64_t at) {
    REAL(pwrite64);
    if (ours(fd) && now()) STOP(if (mode == TEAR) real(fd, data, size / 2, at));
    return real(fd, data, size, at);
}
ssize_t pwrite(int fd, const void *data, size_t size, off_t at) { return pwrite64(fd, data, size, at); }
ssize_t write(int fd, const void *data, size_t size) {
    REAL(write);
    if (ours(fd) && now()) STOP(if (mode == TEAR) real(fd, data, size / 2));
    return real(fd, data, size);
}
int fsync(int fd) { REAL(fsync); if (ours(fd) && now()) STOP(); return real(fd); }
int fdatasync(int fd) { REAL(fdatasync); if (ours(fd) && now()) STOP(); return real(fd); }
int ftruncate64(int fd, off64_t size) { REAL(ftruncate64); if (ours(fd) && now()) STOP(); return real(fd, size); }
int ftruncate(int fd, off_t size) { return ftruncate64(fd, size); }
int unlink(const char *path) {
    REAL(unlink);
    if (inside(path) && now()) STOP();
    return real(path);
}
