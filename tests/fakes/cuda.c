/* A CUDA driver that is played: the calls of nbos_kernel/gpu/driver.py, with the checks and errors of the real one.
 *
 * How it behaves is read from the environment when cuInit is called:
 *   FAKE_CUDA_SMS=132      SMs of the device
 *   FAKE_CUDA_UUID=…       its UUID, as text
 *   FAKE_CUDA_GRAIN=2      SMs of the smallest group (4 on Ampere)
 *   FAKE_CUDA_FAIL=call:code[,call:code…]   these calls are answered with this error; 999 loses the device for good
 *   FAKE_CUDA_CHECKPOINTS=folder   one file a process, named by its pid: its state (a number), and the pairs of its
 *                                  latest restore. A call named in the file `fail` there is refused as above
 *   FAKE_CUDA_GPUS=uuid,uuid…      there are these GPUs; a restore's pairs must name each, once as old and once as new
 * Built with -DOLD it is a driver from before green contexts. With -DCHECK_CUDA_H the
 * compiler compares every declaration here with NVIDIA's own.
 */
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#ifdef CHECK_CUDA_H
#include <cuda.h>
_Static_assert(sizeof(CUdevResource) == 144, "CUdevResource");
_Static_assert(offsetof(CUdevResource, sm) == 96, "sm");
#else
typedef int CUresult;
typedef int CUdevice;
typedef struct CUstream_st *CUstream;
typedef struct CUgreenCtx_st *CUgreenCtx;
typedef struct CUdevResourceDesc_st *CUdevResourceDesc;
typedef int CUdevResourceType;
typedef struct {
    unsigned int smCount, minSmPartitionSize, smCoscheduledAlignment;
} CUdevSmResource;
typedef struct {
    CUdevResourceType type;
    unsigned char _internal_padding[92];
    union {
        CUdevSmResource sm;
        unsigned char _oversize[48];
    };
} CUdevResource;
#define CUDA_SUCCESS 0
#define CUDA_ERROR_INVALID_VALUE 1
#define CUDA_ERROR_OUT_OF_MEMORY 2
#define CUDA_ERROR_NOT_INITIALIZED 3
#define CUDA_ERROR_INVALID_DEVICE 101
#define CUDA_ERROR_INVALID_HANDLE 400
#define CUDA_ERROR_INVALID_RESOURCE_TYPE 914
#define CUDA_ERROR_INVALID_RESOURCE_CONFIGURATION 915
#endif

#define MAX_SMS 512

/* What the padding of a resource holds here: which split made it, and which SMs it stands for. */
typedef struct {
    int split, first, count;
} Own;

struct CUdevResourceDesc_st {
    int sms[MAX_SMS], count;
};
struct CUgreenCtx_st {
    int sms[MAX_SMS], count, alive;
};
struct CUstream_st {
    struct CUgreenCtx_st *context;
};

static int ready, lost, sms = 132, grain = 2, splits, contexts;

static CUresult answer(const char *call) {
    const char *fail = getenv("FAKE_CUDA_FAIL");
    if (lost) return (CUresult)lost;
    for (const char *at = fail; at && *at;) {
        size_t length = strlen(call);
        if (!strncmp(at, call, length) && at[length] == ':') {
            int code = atoi(at + length + 1);
            if (code == 999) lost = code;
            return (CUresult)code;
        }
        at = strchr(at, ',');
        if (at) at++;
    }
    return ready || !strcmp(call, "cuInit") ? CUDA_SUCCESS : CUDA_ERROR_NOT_INITIALIZED;
}

#define CHECK(call)                     \
    do {                                \
        CUresult refused = answer(call); \
        if (refused) return refused;    \
    } while (0)

static int number(const char *name, int otherwise) {
    const char *text = getenv(name);
    return text ? atoi(text) : otherwise;
}

static void fill(CUdevResource *resource, int split, int first, int count) {
    Own own = {split, first, count};
    memset(resource, 0, sizeof *resource);
    resource->type = (CUdevResourceType)1;
    memcpy(resource->_internal_padding, &own, sizeof own);
    resource->sm.smCount = (unsigned)count;
    resource->sm.minSmPartitionSize = (unsigned)grain;
    resource->sm.smCoscheduledAlignment = (unsigned)grain;
}

CUresult cuInit(unsigned int flags) {
    sms = number("FAKE_CUDA_SMS", 132);
    grain = number("FAKE_CUDA_GRAIN", 2);
    CHECK("cuInit");
    ready = 1;
    return flags ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}

CUresult cuDriverGetVersion(int *version) {
#ifdef OLD
    *version = 12020;
#else
    *version = 13000;
#endif
    return CUDA_SUCCESS;
}

CUresult cuGetErrorName(CUresult error, const char **name) {
    switch ((int)error) {
    case 1: *name = "CUDA_ERROR_INVALID_VALUE"; break;
    case 2: *name = "CUDA_ERROR_OUT_OF_MEMORY"; break;
    case 3: *name = "CUDA_ERROR_NOT_INITIALIZED"; break;
    case 100: *name = "CUDA_ERROR_NO_DEVICE"; break;
    case 101: *name = "CUDA_ERROR_INVALID_DEVICE"; break;
    case 401: *name = "CUDA_ERROR_ILLEGAL_STATE"; break;
    case 800: *name = "CUDA_ERROR_NOT_PERMITTED"; break;
    case 801: *name = "CUDA_ERROR_NOT_SUPPORTED"; break;
    case 805: *name = "CUDA_ERROR_MPS_CONNECTION_FAILED"; break;
    case 915: *name = "CUDA_ERROR_INVALID_RESOURCE_CONFIGURATION"; break;
    case 999: *name = "CUDA_ERROR_UNKNOWN"; break;
    default: *name = NULL; return CUDA_ERROR_INVALID_VALUE;
    }
    return CUDA_SUCCESS;
}

/* Of FAKE_CUDA_GPUS; one where that is not set. */
static int gpus(void) {
    int count = 1;
    for (const char *at = getenv("FAKE_CUDA_GPUS"); at && (at = strchr(at, ',')); at++) count++;
    return count;
}

CUresult cuDeviceGetCount(int *count) {
    CHECK("cuDeviceGetCount");
    *count = gpus();
    return CUDA_SUCCESS;
}

CUresult cuDeviceGet(CUdevice *device, int ordinal) {
    CHECK("cuDeviceGet");
    if (ordinal < 0 || ordinal >= gpus()) return CUDA_ERROR_INVALID_DEVICE;
    *device = ordinal;
    return CUDA_SUCCESS;
}

#ifndef OLD
CUresult cuDeviceGetDevResource(CUdevice device, CUdevResource *resource, CUdevResourceType type) {
    CHECK("cuDeviceGetDevResource");
    if (device != 0) return CUDA_ERROR_INVALID_DEVICE;
    if ((int)type != 1) return CUDA_ERROR_INVALID_RESOURCE_TYPE;
    fill(resource, 0, 0, sms);
    return CUDA_SUCCESS;
}

CUresult cuDevSmResourceSplitByCount(CUdevResource *result, unsigned int *groups, const CUdevResource *input,
                                     CUdevResource *remaining, unsigned int flags, unsigned int least) {
    CHECK("cuDevSmResourceSplitByCount");
    if ((int)input->type != 1) return CUDA_ERROR_INVALID_RESOURCE_TYPE;
    Own own;
    memcpy(&own, input->_internal_padding, sizeof own);
    if (own.split) return CUDA_ERROR_INVALID_RESOURCE_CONFIGURATION; /* what a split gave is not split again */
    int unit = flags & 1 ? grain : grain < 8 ? 8 : grain;
    int size = ((int)least + unit - 1) / unit * unit;
    if (size < unit) size = unit;
    int most = own.count / size;
    if (!result) {
        *groups = (unsigned)most;
        return CUDA_SUCCESS;
    }
    int made = (int)*groups < most ? (int)*groups : most;
    splits++;
    for (int i = 0; i < made; i++) fill(&result[i], splits, own.first + i * size, size);
    *groups = (unsigned)made;
    if (remaining) {
        memset(remaining, 0, sizeof *remaining);
        if (own.count > made * size) fill(remaining, splits, own.first + made * size, own.count - made * size);
    }
    return CUDA_SUCCESS;
}

CUresult cuDevResourceGenerateDesc(CUdevResourceDesc *description, CUdevResource *resources, unsigned int count) {
    CHECK("cuDevResourceGenerateDesc");
    if (!count) return CUDA_ERROR_INVALID_VALUE;
    struct CUdevResourceDesc_st *made = calloc(1, sizeof *made);
    int split = -1;
    for (unsigned i = 0; i < count; i++) {
        Own own;
        memcpy(&own, resources[i]._internal_padding, sizeof own);
        if ((int)resources[i].type != 1 || (split >= 0 && own.split != split)) {
            free(made);
            return CUDA_ERROR_INVALID_RESOURCE_CONFIGURATION;
        }
        split = own.split;
        for (int sm = 0; sm < own.count; sm++) made->sms[made->count++] = own.first + sm;
    }
    *description = made;
    return CUDA_SUCCESS;
}

CUresult cuGreenCtxCreate(CUgreenCtx *context, CUdevResourceDesc description, CUdevice device, unsigned int flags) {
    CHECK("cuGreenCtxCreate");
    if (device != 0) return CUDA_ERROR_INVALID_DEVICE;
    if (!(flags & 1) || !description) return CUDA_ERROR_INVALID_VALUE;
    struct CUgreenCtx_st *made = calloc(1, sizeof *made);
    memcpy(made->sms, description->sms, sizeof made->sms);
    made->count = description->count;
    made->alive = 1;
    contexts++;
    *context = made;
    return CUDA_SUCCESS;
}

CUresult cuGreenCtxDestroy(CUgreenCtx context) {
    CHECK("cuGreenCtxDestroy");
    if (!context || !context->alive) return CUDA_ERROR_INVALID_HANDLE;
    context->alive = 0;
    contexts--;
    return CUDA_SUCCESS;
}

CUresult cuGreenCtxGetDevResource(CUgreenCtx context, CUdevResource *resource, CUdevResourceType type) {
    CHECK("cuGreenCtxGetDevResource");
    if (!context || !context->alive) return CUDA_ERROR_INVALID_HANDLE;
    if ((int)type != 1) return CUDA_ERROR_INVALID_RESOURCE_TYPE;
    fill(resource, 0, context->sms[0], context->count);
    return CUDA_SUCCESS;
}

CUresult cuGreenCtxStreamCreate(CUstream *stream, CUgreenCtx context, unsigned int flags, int priority) {
    CHECK("cuGreenCtxStreamCreate");
    (void)priority;
    if (!context || !context->alive) return CUDA_ERROR_INVALID_HANDLE;
    if (!(flags & 1)) return CUDA_ERROR_INVALID_VALUE; /* CU_STREAM_NON_BLOCKING must be given */
    struct CUstream_st *made = calloc(1, sizeof *made);
    made->context = context;
    *stream = made;
    return CUDA_SUCCESS;
}
#endif

#ifndef CHECK_CUDA_H /* gpu_daemon/sms.py: cuda.h calls the newer function by this name */
CUresult cuDeviceGetUuid(unsigned char uuid[16], CUdevice device) {
    CHECK("cuDeviceGetUuid");
    const char *hex = getenv("FAKE_CUDA_GPUS");
    if (device < 0 || device >= gpus()) return CUDA_ERROR_INVALID_DEVICE;
    for (int skip = device; hex && skip; skip--) hex = strchr(hex, ',') + 1;
    if (!hex) hex = getenv("FAKE_CUDA_UUID");
    memset(uuid, 0, 16);
    for (int i = 0; hex && i < 16; i++) {
        unsigned byte;
        while (*hex == '-') hex++;
        if (sscanf(hex, "%2x", &byte) != 1) break;
        uuid[i] = (unsigned char)byte;
        hex += 2;
    }
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int *value, int attribute, CUdevice device) {
    CHECK("cuDeviceGetAttribute");
    if (device < 0 || device >= gpus()) return CUDA_ERROR_INVALID_DEVICE;
    if (attribute != 16) return CUDA_ERROR_INVALID_VALUE; /* CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT */
    *value = sms;
    return CUDA_SUCCESS;
}
#endif

/* -- checkpoints: of other processes, so that their states stand in files ----------------------------------------- */

#if !defined(OLD)
#ifndef CHECK_CUDA_H
typedef int CUprocessState;
typedef unsigned long long cuuint64_t;
typedef struct {
    char bytes[16];
} CUuuid;
typedef struct {
    unsigned int timeoutMs, reserved0;
    cuuint64_t reserved1[7];
} CUcheckpointLockArgs;
typedef struct {
    cuuint64_t reserved[8];
} CUcheckpointCheckpointArgs, CUcheckpointUnlockArgs;
typedef struct {
    CUuuid oldUuid, newUuid;
} CUcheckpointGpuPair;
typedef struct {
    CUcheckpointGpuPair *gpuPairs;
    unsigned int gpuPairsCount;
    char reserved[52 - sizeof(CUcheckpointGpuPair *)];
    cuuint64_t reserved1;
} CUcheckpointRestoreArgs;
#define CUDA_ERROR_ILLEGAL_STATE 401
#endif
_Static_assert(sizeof(CUcheckpointLockArgs) == 64, "CUcheckpointLockArgs");
_Static_assert(sizeof(CUcheckpointRestoreArgs) == 64, "CUcheckpointRestoreArgs");

static FILE *states(const char *name, const char *mode) {
    char path[512];
    const char *folder = getenv("FAKE_CUDA_CHECKPOINTS");
    snprintf(path, sizeof path, "%s/%s", folder ? folder : ".", name);
    return fopen(path, mode);
}

static CUresult refused(const char *call) {
    CUresult code = answer(call);
    char line[256] = "";
    FILE *file = states("fail", "r");
    if (file) {
        if (!fgets(line, sizeof line, file)) line[0] = 0;
        fclose(file);
    }
    size_t length = strlen(call);
    if (!code && !strncmp(line, call, length) && line[length] == ':') {
        code = (CUresult)atoi(line + length + 1);
        if ((int)code == 12345) pause(); /* a driver that hangs */
    }
    return code;
}

static int state_of(int pid) {
    char name[32];
    int state = 0;
    snprintf(name, sizeof name, "%d", pid);
    FILE *file = states(name, "r");
    if (file) {
        if (fscanf(file, "%d", &state) != 1) state = 3;
        fclose(file);
    }
    return state;
}

static void text(const CUuuid *uuid, char *out) {
    for (int i = 0; i < 16; i++) sprintf(out + 2 * i, "%02x", (unsigned char)uuid->bytes[i]);
}

static void become(int pid, int state, const CUcheckpointRestoreArgs *args) {
    char name[32], old[33], new[33];
    snprintf(name, sizeof name, "%d", pid);
    FILE *file = states(name, "w");
    if (!file) return;
    fprintf(file, "%d\n", state);
    for (unsigned i = 0; args && i < args->gpuPairsCount; i++) {
        text(&args->gpuPairs[i].oldUuid, old);
        text(&args->gpuPairs[i].newUuid, new);
        fprintf(file, "%s %s\n", old, new);
    }
    fclose(file);
}

/* What every call does: the process must be there, and in the state `from`; then it is in `to`. */
static CUresult move(const char *call, int pid, int from, int to, const CUcheckpointRestoreArgs *args) {
    CUresult code = refused(call);
    if (pid <= 0 || kill(pid, 0)) return CUDA_ERROR_INVALID_VALUE;
    if (!code && state_of(pid) != from) code = (CUresult)CUDA_ERROR_ILLEGAL_STATE;
    if (!code) become(pid, to, args);
    return code;
}

/* Every GPU of the host exactly once on this side of the pairs. */
static int named(const CUcheckpointRestoreArgs *args, int new) {
    unsigned count = 0;
    for (const char *at = getenv("FAKE_CUDA_GPUS"); at && *at; at = strchr(at, ',') ? strchr(at, ',') + 1 : "") {
        unsigned times = 0;
        count++;
        for (unsigned i = 0; i < args->gpuPairsCount; i++) {
            char told[33], plain[33] = "";
            text(new ? &args->gpuPairs[i].newUuid : &args->gpuPairs[i].oldUuid, told);
            for (const char *c = at; *c && *c != ',' && strlen(plain) < 32; c++)
                if (*c != '-') strncat(plain, c, 1);
            times += !strcmp(told, plain);
        }
        if (times != 1) return 0;
    }
    return count == args->gpuPairsCount;
}

CUresult cuCheckpointProcessGetState(int pid, CUprocessState *state) {
    CUresult code = refused("cuCheckpointProcessGetState");
    if (code) return code;
    if (pid <= 0 || kill(pid, 0)) return CUDA_ERROR_INVALID_VALUE;
    *state = (CUprocessState)state_of(pid);
    return CUDA_SUCCESS;
}

CUresult cuCheckpointProcessLock(int pid, CUcheckpointLockArgs *args) {
    if (args && (args->reserved0 || args->reserved1[6])) return CUDA_ERROR_INVALID_VALUE;
    return move("cuCheckpointProcessLock", pid, 0, 1, NULL);
}

CUresult cuCheckpointProcessCheckpoint(int pid, CUcheckpointCheckpointArgs *args) {
    (void)args;
    return move("cuCheckpointProcessCheckpoint", pid, 1, 2, NULL);
}

CUresult cuCheckpointProcessRestore(int pid, CUcheckpointRestoreArgs *args) {
    if (args && args->gpuPairsCount && (!named(args, 0) || !named(args, 1))) return CUDA_ERROR_INVALID_VALUE;
    CUresult code = move("cuCheckpointProcessRestore", pid, 2, 1, args);
    if (code && state_of(pid) == 2) become(pid, 3, NULL); /* stuck for good */
    return code;
}

CUresult cuCheckpointProcessUnlock(int pid, CUcheckpointUnlockArgs *args) {
    (void)args;
    return move("cuCheckpointProcessUnlock", pid, 1, 0, NULL);
}
#endif

/* For tests: the SMs that kernels on this stream would see, and how many green contexts there are. */
int fake_sms_of(CUstream stream, int *out) {
    memcpy(out, stream->context->sms, sizeof(int) * (size_t)stream->context->count);
    return stream->context->count;
}

int fake_contexts(void) { return contexts; }
