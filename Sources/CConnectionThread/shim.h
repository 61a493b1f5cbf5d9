#ifndef SMAP_CCONNECTIONTHREAD_SHIM_H
#define SMAP_CCONNECTIONTHREAD_SHIM_H

// Linux calls that Swift's Glibc module does not show.
#ifdef __linux__
#include <sys/eventfd.h>
#include <sys/prctl.h>

static inline int smap_eventfd(void) {
    return eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
}

static inline void smap_name_this_thread(const char *name) {
    prctl(PR_SET_NAME, name, 0, 0, 0);
}
#endif

#endif
