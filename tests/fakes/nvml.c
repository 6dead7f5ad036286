/* Plays libnvidia-ml.so.1 from the scenario in the file that NBOS_FAKE_NVML names, read anew at every call:
 *
 *     init 9                         nvmlInit answers with this error (0: works)
 *     driver 580.65.06
 *     gpu uuid=GPU-0 name=NVIDIA_H200 memory=150754820096 cc=9.0 temperature=41 power=310000 ...
 *     mig uuid=MIG-0 name=NVIDIA_H200_MIG_1g.18gb memory=18790481920 sms=16 gi=7 ci=0    (of the gpu above it)
 *     fault nvmlDeviceGetName 1 15   the call about GPU 1 ('*': any) answers with this error; -1: not while this stands
 *     event 0 79                     GPU 0 reports an XID: delivered once to whoever listens when the line appears
 *
 * '_' in a value is read as a blank. What a gpu's line leaves out is answered with NOT_SUPPORTED. OLD_DRIVER leaves out
 * the functions that came late. Nothing here is NVIDIA's: only the shapes of calls and structures, as nvml.h has them.
 */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { SUCCESS, UNINITIALIZED, INVALID_ARGUMENT, NOT_SUPPORTED, NO_PERMISSION, NOT_FOUND = 6, INSUFFICIENT_SIZE,
       DRIVER_NOT_LOADED = 9, TIMEOUT };
enum { GPUS = 16, MIGS = 8, EVENTS = 256, FAULTS = 64, LINE = 1024 };

struct device { char line[LINE]; int migs; char mig[MIGS][LINE]; };
struct fault { char function[64]; int gpu; int code; };
struct event { int gpu; unsigned long long xid; unsigned gi; };
struct world {
    int init, gpus, faults, events;
    char driver[80];
    struct device gpu[GPUS];
    struct fault fault[FAULTS];
    struct event event[EVENTS];
};

static int started;
static pthread_mutex_t counting = PTHREAD_MUTEX_INITIALIZER;

/* One copy a thread: calls come from several. */
static struct world *look(void) {
    static _Thread_local struct world world;
    struct world *w = &world;
    memset(w, 0, sizeof *w);
    strcpy(w->driver, "580.65.06");
    const char *path = getenv("NBOS_FAKE_NVML");
    FILE *file = path ? fopen(path, "r") : NULL;
    if (!file) { w->init = DRIVER_NOT_LOADED; return w; }
    char line[LINE];
    while (fgets(line, sizeof line, file)) {
        line[strcspn(line, "\n")] = 0;
        if (sscanf(line, "init %d", &w->init) == 1) continue;
        if (sscanf(line, "driver %79s", w->driver) == 1) continue;
        if (!strncmp(line, "gpu ", 4) && w->gpus < GPUS) { strcpy(w->gpu[w->gpus++].line, line); continue; }
        if (!strncmp(line, "mig ", 4) && w->gpus) {
            struct device *d = &w->gpu[w->gpus - 1];
            if (d->migs < MIGS) strcpy(d->mig[d->migs++], line);
            continue;
        }
        struct fault *f = &w->fault[w->faults];
        char which[16];
        if (w->faults < FAULTS && sscanf(line, "fault %63s %15s %d", f->function, which, &f->code) == 3) {
            f->gpu = which[0] == '*' ? -1 : atoi(which);
            w->faults++;
            continue;
        }
        struct event *e = &w->event[w->events];
        if (w->events < EVENTS && sscanf(line, "event %d %llu %u", &e->gpu, &e->xid, &e->gi) >= 2) w->events++;
    }
    fclose(file);
    return w;
}

/* A handle is 1 + the GPU's number, and for a MIG device 100 times (1 + its number) more. */
static int gpu_of(void *h) { return (int)((long)h % 100) - 1; }
static int mig_of(void *h) { return (int)((long)h / 100) - 1; }
static void *handle(int gpu, int mig) { return (void *)(long)(100 * (mig + 1) + gpu + 1); }

static const char *line_of(struct world *w, void *h) {
    int gpu = gpu_of(h), mig = mig_of(h);
    if (gpu < 0 || gpu >= w->gpus || mig >= w->gpu[gpu].migs) return NULL;
    return mig < 0 ? w->gpu[gpu].line : w->gpu[gpu].mig[mig];
}

/* The value of `key=` in a device's line; 0 when it has none. */
static int text(const char *line, const char *key, char *out, size_t room) {
    char wanted[64];
    snprintf(wanted, sizeof wanted, " %s=", key);
    const char *at = line ? strstr(line, wanted) : NULL;
    if (!at) return 0;
    at += strlen(wanted);
    size_t n = strcspn(at, " ");
    if (n >= room) n = room - 1;
    memcpy(out, at, n);
    out[n] = 0;
    for (char *c = out; *c; c++) if (*c == '_') *c = ' ';
    return 1;
}

static int number(const char *line, const char *key, unsigned long long *out) {
    char value[64];
    if (!text(line, key, value, sizeof value)) return 0;
    *out = strtoull(value, NULL, 0);
    return 1;
}

static int fault_of(struct world *w, const char *function, int gpu) {
    for (int i = 0; i < w->faults; i++)
        if (!strcmp(w->fault[i].function, function) && (w->fault[i].gpu < 0 || w->fault[i].gpu == gpu))
            return w->fault[i].code;
    return SUCCESS;
}

static int faulty(struct world *w, const char *function, int gpu) {
    if (!started) return UNINITIALIZED;
    int code = fault_of(w, function, gpu);
    while (code == -1) {
        usleep(20000);
        code = fault_of(look(), function, gpu);
    }
    return code;
}

/* Every call about a device begins like this. */
#define OPEN(h)                                                     \
    struct world *w = look();                                       \
    const char *line = line_of(w, h);                               \
    int wrong = faulty(w, __func__, gpu_of(h));                     \
    if (wrong) return wrong;                                        \
    if (!line) return INVALID_ARGUMENT;

#define NUMBER(function, key, type)                                 \
    int function(void *h, type *out) {                              \
        OPEN(h)                                                     \
        unsigned long long value;                                   \
        if (!number(line, key, &value)) return NOT_SUPPORTED;       \
        *out = (type)value;                                         \
        return SUCCESS;                                             \
    }

#define TEXT(function, key)                                         \
    int function(void *h, char *out, unsigned room) {               \
        OPEN(h)                                                     \
        return text(line, key, out, room) ? SUCCESS : NOT_SUPPORTED;\
    }

/* -- the library ------------------------------------------------------------------------------------------------- */

int nvmlInitWithFlags(unsigned flags) {
    (void)flags;
    struct world *w = look();
    if (w->init) return w->init;
    pthread_mutex_lock(&counting);
    started++;
    pthread_mutex_unlock(&counting);
    return SUCCESS;
}

int nvmlShutdown(void) {
    pthread_mutex_lock(&counting);
    int was = started;
    if (started) started--;
    pthread_mutex_unlock(&counting);
    return was ? SUCCESS : UNINITIALIZED;
}

const char *nvmlErrorString(int code) {
    static _Thread_local char words[64];
    snprintf(words, sizeof words, "played error %d", code);
    return words;
}

int nvmlSystemGetDriverVersion(char *out, unsigned room) {
    struct world *w = look();
    int wrong = faulty(w, __func__, -1);
    if (wrong) return wrong;
    snprintf(out, room, "%s", w->driver);
    return SUCCESS;
}

/* -- devices ----------------------------------------------------------------------------------------------------- */

int nvmlDeviceGetCount_v2(unsigned *count) {
    struct world *w = look();
    int wrong = faulty(w, __func__, -1);
    if (wrong) return wrong;
    *count = (unsigned)w->gpus;
    return SUCCESS;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **out) {
    struct world *w = look();
    int wrong = faulty(w, __func__, (int)index);
    if (wrong) return wrong;
    if ((int)index >= w->gpus) return INVALID_ARGUMENT;
    *out = handle((int)index, -1);
    return SUCCESS;
}

int nvmlDeviceGetHandleByUUID(const char *uuid, void **out) {
    struct world *w = look();
    for (int gpu = 0; gpu < w->gpus; gpu++)
        for (int mig = -1; mig < w->gpu[gpu].migs; mig++) {
            char found[96];
            if (!text(line_of(w, handle(gpu, mig)), "uuid", found, sizeof found) || strcmp(found, uuid)) continue;
            int wrong = faulty(w, __func__, gpu);
            if (wrong) return wrong;
            *out = handle(gpu, mig);
            return SUCCESS;
        }
    return NOT_FOUND;
}

TEXT(nvmlDeviceGetUUID, "uuid")
TEXT(nvmlDeviceGetName, "name")

struct memory { unsigned long long total, free, used; };
int nvmlDeviceGetMemoryInfo(void *h, struct memory *out) {
    OPEN(h)
    out->used = 0;
    number(line, "used", &out->used);
    if (!number(line, "memory", &out->total)) return NOT_SUPPORTED;
    out->free = out->total - out->used;
    return SUCCESS;
}

int nvmlDeviceGetCudaComputeCapability(void *h, int *major, int *minor) {
    OPEN(h)
    char value[16];
    if (!text(line, "cc", value, sizeof value)) return NOT_SUPPORTED;
    return sscanf(value, "%d.%d", major, minor) == 2 ? SUCCESS : NOT_SUPPORTED;
}

/* -- MIG: a gpu with `mig=1`, and the lines below it ------------------------------------------------------------- */
#ifndef OLD_DRIVER
int nvmlDeviceGetMigMode(void *h, unsigned *current, unsigned *pending) {
    OPEN(h)
    unsigned long long mode;
    if (!number(line, "mig", &mode)) return NOT_SUPPORTED;
    *current = *pending = (unsigned)mode;
    return SUCCESS;
}

int nvmlDeviceGetMaxMigDeviceCount(void *h, unsigned *count) {
    OPEN(h)
    *count = MIGS;
    return SUCCESS;
}

int nvmlDeviceGetMigDeviceHandleByIndex(void *h, unsigned index, void **out) {
    OPEN(h)
    /* As NVML has it: the numbers of devices that were destroyed are left free. Here every second one is. */
    int mig = (int)index / 2;
    if (index % 2 || mig >= w->gpu[gpu_of(h)].migs) return NOT_FOUND;
    *out = handle(gpu_of(h), mig);
    return SUCCESS;
}

struct attributes { unsigned sms, other[7]; unsigned long long megabytes; };
int nvmlDeviceGetAttributes_v2(void *h, struct attributes *out) {
    OPEN(h)
    unsigned long long sms;
    if (mig_of(h) < 0 || !number(line, "sms", &sms)) return NOT_SUPPORTED;
    memset(out, 0, sizeof *out);
    out->sms = (unsigned)sms;
    return SUCCESS;
}

NUMBER(nvmlDeviceGetGpuInstanceId, "gi", unsigned)
NUMBER(nvmlDeviceGetComputeInstanceId, "ci", unsigned)
#endif

/* -- how it is --------------------------------------------------------------------------------------------------- */

NUMBER(nvmlDeviceGetPowerUsage, "power", unsigned)
NUMBER(nvmlDeviceGetEnforcedPowerLimit, "limit", unsigned)
NUMBER(nvmlDeviceGetRetiredPagesPendingStatus, "pages", unsigned)
NUMBER(nvmlDeviceGetCurrentClocksThrottleReasons, "reasons", unsigned long long)

int nvmlDeviceGetTemperature(void *h, unsigned sensor, unsigned *out) {
    OPEN(h)
    unsigned long long value;
    if (sensor || !number(line, "temperature", &value)) return NOT_SUPPORTED;
    *out = (unsigned)value;
    return SUCCESS;
}

int nvmlDeviceGetTemperatureThreshold(void *h, unsigned which, unsigned *out) {
    OPEN(h)
    unsigned long long value;
    if (which != 1 || !number(line, "slowdown", &value)) return NOT_SUPPORTED;
    *out = (unsigned)value;
    return SUCCESS;
}

int nvmlDeviceGetUtilizationRates(void *h, unsigned out[2]) {
    OPEN(h)
    unsigned long long value;
    if (!number(line, "utilisation", &value)) return NOT_SUPPORTED;
    out[0] = (unsigned)value;
    out[1] = 0;
    return SUCCESS;
}

int nvmlDeviceGetTotalEccErrors(void *h, unsigned kind, unsigned counter, unsigned long long *out) {
    OPEN(h)
    /* uncorrected (1), since the last reset (0) */
    if (kind != 1 || counter != 0 || !number(line, "ecc", out)) return NOT_SUPPORTED;
    return SUCCESS;
}

#ifndef OLD_DRIVER
int nvmlDeviceGetRemappedRows(void *h, unsigned *corrected, unsigned *uncorrected, unsigned *pending, unsigned *failed) {
    OPEN(h)
    char value[64];
    if (!text(line, "rows", value, sizeof value)) return NOT_SUPPORTED;
    return sscanf(value, "%u,%u,%u,%u", corrected, uncorrected, pending, failed) == 4 ? SUCCESS : NOT_SUPPORTED;
}

NUMBER(nvmlDeviceGetCurrentClocksEventReasons, "reasons", unsigned long long)

struct field { unsigned id, scope; long long at, latency; unsigned type, result; union { unsigned ui; double d; } value; };
int nvmlDeviceGetFieldValues(void *h, int count, struct field *fields) {
    OPEN(h)
    for (int i = 0; i < count; i++) {
        unsigned long long action;
        fields[i].type = 1;
        fields[i].result = NOT_SUPPORTED;
        if (fields[i].id == 230 && number(line, "recovery", &action)) {
            fields[i].value.ui = (unsigned)action;
            fields[i].result = SUCCESS;
        }
    }
    return SUCCESS;
}
#endif

/* Clocks: `clocks=210,1500,1980`; what is locked and reset is written to the file that NBOS_FAKE_NVML_CLOCKS names. */
static int clocks(const char *line, unsigned *count, unsigned *out) {
    char value[512], *rest = value, *one;
    unsigned found = 0, room = *count;
    if (!text(line, "clocks", value, sizeof value)) return NOT_SUPPORTED;
    while ((one = strsep(&rest, ",")))
        if (found++ < room) out[found - 1] = (unsigned)atoi(one);
    *count = found;
    return found > room ? INSUFFICIENT_SIZE : SUCCESS;
}

int nvmlDeviceGetSupportedMemoryClocks(void *h, unsigned *count, unsigned *out) {
    OPEN(h)
    unsigned room = *count;
    char value[8];
    if (!text(line, "clocks", value, sizeof value)) return NOT_SUPPORTED;
    *count = 1;
    if (room < 1) return INSUFFICIENT_SIZE;
    out[0] = 2619;
    return SUCCESS;
}

int nvmlDeviceGetSupportedGraphicsClocks(void *h, unsigned memory, unsigned *count, unsigned *out) {
    OPEN(h)
    return memory == 2619 ? clocks(line, count, out) : NOT_FOUND;
}

#ifndef OLD_DRIVER
static int told(int gpu, const char *format, unsigned low, unsigned high) {
    const char *path = getenv("NBOS_FAKE_NVML_CLOCKS");
    FILE *file = path ? fopen(path, "a") : NULL;
    if (!file) return NOT_SUPPORTED;
    fprintf(file, format, gpu, low, high);
    fclose(file);
    return SUCCESS;
}

int nvmlDeviceSetGpuLockedClocks(void *h, unsigned low, unsigned high) {
    OPEN(h)
    return low > high ? INVALID_ARGUMENT : told(gpu_of(h), "%d locked %u-%u\n", low, high);
}

int nvmlDeviceResetGpuLockedClocks(void *h) {
    OPEN(h)
    return told(gpu_of(h), "%d reset\n", 0, 0);
}
#endif

/* The CUDA version that the driver speaks: that of 580. */
int nvmlSystemGetCudaDriverVersion_v2(int *version) {
    struct world *w = look();
    int wrong = faulty(w, __func__, -1);
    if (wrong) return wrong;
    *version = 13000;
    return SUCCESS;
}

/* Processes: `procs=PID:BYTES,…`, those under MPS `mps=…`; BYTES may be `-`: not told; on a GPU with MIG `PID:BYTES:GI`. */
struct process { unsigned pid; unsigned long long bytes; unsigned gi, ci; };
static int processes(const char *line, const char *key, unsigned *count, struct process *out) {
    char value[512], *rest = value, *one;
    unsigned found = 0, room = out ? *count : 0;
    if (!text(line, key, value, sizeof value)) { *count = 0; return SUCCESS; }
    while ((one = strsep(&rest, ","))) {
        struct process p = { 0, 0, 0xFFFFFFFF, 0xFFFFFFFF };
        if (sscanf(one, "%u:%llu:%u", &p.pid, &p.bytes, &p.gi) < 1) continue;
        if (strstr(one, ":-")) p.bytes = ~0ULL; /* not available */
        if (found < room) out[found] = p;
        found++;
    }
    *count = found;
    return found > room ? INSUFFICIENT_SIZE : SUCCESS;
}

#define PROCESSES(function, key)                                          \
    int function(void *h, unsigned *count, struct process *out) {         \
        OPEN(h)                                                           \
        return processes(line, key, count, out);                          \
    }

PROCESSES(nvmlDeviceGetComputeRunningProcesses_v2, "procs")
PROCESSES(nvmlDeviceGetMPSComputeRunningProcesses_v2, "mps")
#ifndef OLD_DRIVER
PROCESSES(nvmlDeviceGetComputeRunningProcesses_v3, "procs")
PROCESSES(nvmlDeviceGetMPSComputeRunningProcesses_v3, "mps")
#endif

/* How busy they keep the SMs: `busy=PID:PERCENT,…`; there is a sample of this very moment at every look. */
struct utilisation { unsigned pid; unsigned long long at; unsigned sm, memory, encoder, decoder; };
int nvmlDeviceGetProcessUtilization(void *h, struct utilisation *out, unsigned *count, unsigned long long since) {
    OPEN(h)
    char value[512], *rest = value, *one;
    unsigned found = 0, room = out ? *count : 0;
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    unsigned long long at = (unsigned long long)now.tv_sec * 1000000ULL + (unsigned long long)now.tv_nsec / 1000;
    *count = 0;
    if (!text(line, "busy", value, sizeof value)) return NOT_SUPPORTED;
    while ((one = strsep(&rest, ","))) {
        struct utilisation u = { .at = at };
        if (at <= since || sscanf(one, "%u:%u", &u.pid, &u.sm) < 2) continue;
        if (found < room) out[found] = u;
        found++;
    }
    *count = found;
    return found > room ? INSUFFICIENT_SIZE : SUCCESS;
}

/* -- events ------------------------------------------------------------------------------------------------------ */

struct set { int seen; int gpu[GPUS]; };
struct data { void *device; unsigned long long type, xid; unsigned gi, ci; };

int nvmlEventSetCreate(struct set **out) {
    struct world *w = look();
    int wrong = faulty(w, __func__, -1);
    if (wrong) return wrong;
    *out = calloc(1, sizeof **out);
    (*out)->seen = w->events;
    return SUCCESS;
}

int nvmlEventSetFree(struct set *set) {
    free(set);
    return SUCCESS;
}

int nvmlDeviceRegisterEvents(void *h, unsigned long long kinds, struct set *set) {
    OPEN(h)
    if (mig_of(h) >= 0 || !(kinds & 8)) return NOT_SUPPORTED;
    set->gpu[gpu_of(h)] = 1;
    return SUCCESS;
}

#ifndef OLD_DRIVER
int nvmlEventSetWait_v2(struct set *set, struct data *out, unsigned milliseconds) {
    for (unsigned waited = 0;; waited += 10) {
        struct world *w = look();
        int wrong = faulty(w, __func__, -1);
        if (wrong) return wrong;
        while (set->seen < w->events) {
            struct event *e = &w->event[set->seen++];
            if (e->gpu < 0 || e->gpu >= GPUS || !set->gpu[e->gpu]) continue;
            *out = (struct data){ handle(e->gpu, -1), 8, e->xid, e->gi, 0 };
            return SUCCESS;
        }
        if (waited >= milliseconds) return TIMEOUT;
        usleep(10000);
    }
}
#endif
