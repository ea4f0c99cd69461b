/*
 * How much memory each device has given out, over all processes: on hardware the device knows, here nobody would.
 *
 * Each process that takes device memory has one small file in /dev/shm with its own counters, and holds flock on it.
 * The use of a device is the sum over all files of the same name prefix.  The kernel drops the lock when the process
 * ends, in whatever way, so a file without a lock is a dead process's: it counts nothing and is removed by whoever sees
 * it.
 *
 * "The same machine" is: same user, same installed copy of this library, same FAKE_CANN_RUN.
 */
#define _GNU_SOURCE
#include "fake_cann.h"

#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define FOLDER "/dev/shm/"
#define PREFIX "fake_cann-"

struct counters {
    uint64_t used[FAKE_CANN_MAX_DEVICES]; /* bytes, by physical device */
};

static pthread_mutex_t ledger_lock = PTHREAD_MUTEX_INITIALIZER;
static struct counters *own;
static int own_file = -1;
static char own_name[NAME_MAX];

/* True when no process holds the lock of this file.  A file that cannot be opened is gone, or another user's: not ours.
 */
static bool is_abandoned(const char *path)
{
    int file = open(path, O_RDWR | O_CLOEXEC | O_NOFOLLOW);
    if (file < 0) {
        return false;
    }
    bool abandoned = flock(file, LOCK_EX | LOCK_NB) == 0;
    if (abandoned) {
        unlink(path);
    }
    close(file);
    return abandoned;
}

static bool has_prefix(const char *text, const char *prefix)
{
    return strncmp(text, prefix, strlen(prefix)) == 0;
}

void fake_cann_remove_leftovers(void)
{
    DIR *folder = opendir(FOLDER);
    if (folder == NULL) {
        return;
    }
    struct dirent *entry;
    while ((entry = readdir(folder)) != NULL) {
        if (has_prefix(entry->d_name, PREFIX)) {
            char path[sizeof FOLDER + NAME_MAX];
            snprintf(path, sizeof path, FOLDER "%s", entry->d_name);
            is_abandoned(path);
        }
    }
    closedir(folder);
}

int fake_cann_create_shared(const char *name)
{
    char path[sizeof FOLDER + NAME_MAX];
    snprintf(path, sizeof path, FOLDER PREFIX "%s", name);
    for (int attempt = 0; attempt < 100; attempt++) {
        int file = open(path, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC | O_NOFOLLOW, 0600);
        if (file < 0 && errno == EEXIST && is_abandoned(path)) {
            continue; /* of a dead process that had the same id */
        }
        if (file < 0) {
            return -1;
        }
        struct stat status;
        /* Another process may have taken the new file for an abandoned one, between open and flock. */
        if (flock(file, LOCK_EX | LOCK_NB) == 0 && fstat(file, &status) == 0 && status.st_nlink > 0) {
            return file;
        }
        close(file);
    }
    errno = EBUSY;
    return -1;
}

/* "hbm-<uid>-<device and inode of this library>-<run>-": the part of the name that all processes of a machine share. */
static void machine_prefix(char *prefix, size_t length)
{
    Dl_info library;
    struct stat status;
    memset(&status, 0, sizeof status);
    if (dladdr((void *)machine_prefix, &library) != 0 && library.dli_fname != NULL) {
        stat(library.dli_fname, &status);
    }
    const char *run = getenv("FAKE_CANN_RUN");
    char word[40];
    snprintf(word, sizeof word, "%s", run != NULL ? run : "0");
    for (char *letter = word; *letter != '\0'; letter++) {
        if (*letter == '/' || *letter == '-') {
            *letter = '_';
        }
    }
    snprintf(prefix, length, "hbm-%u-%lx_%lx-%s-", (unsigned)getuid(), (unsigned long)status.st_dev,
             (unsigned long)status.st_ino, word);
}

static void remove_own_file(void)
{
    if (own_file >= 0) {
        char path[sizeof FOLDER + sizeof PREFIX + NAME_MAX];
        snprintf(path, sizeof path, FOLDER PREFIX "%s", own_name);
        unlink(path);
    }
    fake_cann_remove_leftovers();
}

/* A forked child holds no device memory: the parent's counters are not its own. */
static void forget_after_fork(void)
{
    pthread_mutex_init(&ledger_lock, NULL);
    if (own_file >= 0) {
        close(own_file);
        munmap(own, sizeof *own);
        own_file = -1;
        own = NULL;
    }
}

__attribute__((constructor)) static void start_ledger(void)
{
    fake_cann_remove_leftovers();
    atexit(remove_own_file);
    pthread_atfork(NULL, NULL, forget_after_fork);
}

/* With the lock held.  Without a file (no /dev/shm), the process counts for itself alone. */
static void open_own_file(void)
{
    if (own != NULL) {
        return;
    }
    char prefix[128];
    machine_prefix(prefix, sizeof prefix);
    snprintf(own_name, sizeof own_name, "%s%d", prefix, getpid());
    own_file = fake_cann_create_shared(own_name);
    if (own_file >= 0 && ftruncate(own_file, sizeof *own) == 0) {
        own = mmap(NULL, sizeof *own, PROT_READ | PROT_WRITE, MAP_SHARED, own_file, 0);
    }
    if (own_file < 0 || own == NULL || own == MAP_FAILED) {
        fake_cann_fail(0, "no shared ledger in /dev/shm (%s): memory of other processes is not counted",
                       strerror(errno));
        own = calloc(1, sizeof *own);
    }
}

static uint64_t used_in_file(const char *name, int device)
{
    char path[sizeof FOLDER + NAME_MAX];
    snprintf(path, sizeof path, FOLDER "%s", name);
    if (is_abandoned(path)) {
        return 0;
    }
    int file = open(path, O_RDONLY | O_CLOEXEC | O_NOFOLLOW);
    if (file < 0) {
        return 0;
    }
    struct counters counters;
    ssize_t got = pread(file, &counters, sizeof counters, 0);
    close(file);
    return got == (ssize_t)sizeof counters ? counters.used[device] : 0;
}

/* With the lock held. */
static uint64_t used_by_others(int device)
{
    DIR *folder = opendir(FOLDER);
    if (folder == NULL) {
        return 0;
    }
    char machine[128];
    char prefix[sizeof PREFIX + sizeof machine];
    machine_prefix(machine, sizeof machine);
    snprintf(prefix, sizeof prefix, PREFIX "%s", machine);
    uint64_t used = 0;
    struct dirent *entry;
    while ((entry = readdir(folder)) != NULL) {
        bool is_own = own_file >= 0 && strcmp(entry->d_name + strlen(PREFIX), own_name) == 0;
        if (has_prefix(entry->d_name, prefix) && !is_own) {
            used += used_in_file(entry->d_name, device);
        }
    }
    closedir(folder);
    return used;
}

static size_t used_by_all(int device)
{
    return (own != NULL ? own->used[device] : 0) + used_by_others(device);
}

bool fake_cann_hbm_take(int device, size_t bytes)
{
    pthread_mutex_lock(&ledger_lock);
    open_own_file();
    /* Enter first, look then: of two processes that reach for the last bytes at once, both may fail, never both
     * succeed. */
    __atomic_add_fetch(&own->used[device], bytes, __ATOMIC_SEQ_CST);
    bool fits = used_by_all(device) <= fake_cann_hbm_bytes();
    if (!fits) {
        __atomic_sub_fetch(&own->used[device], bytes, __ATOMIC_SEQ_CST);
    }
    pthread_mutex_unlock(&ledger_lock);
    return fits;
}

void fake_cann_hbm_give_back(int device, size_t bytes)
{
    pthread_mutex_lock(&ledger_lock);
    if (own != NULL && own->used[device] >= bytes) { /* less: memory of the parent, freed in a forked child */
        __atomic_sub_fetch(&own->used[device], bytes, __ATOMIC_SEQ_CST);
    }
    pthread_mutex_unlock(&ledger_lock);
}

size_t fake_cann_hbm_used(int device)
{
    pthread_mutex_lock(&ledger_lock);
    size_t used = used_by_all(device);
    pthread_mutex_unlock(&ledger_lock);
    return used;
}
