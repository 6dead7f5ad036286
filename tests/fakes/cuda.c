/* A CUDA driver that is played: the calls of nbos_kernel/gpu/driver.py, with the checks and errors of the real one.
 *
 * How it behaves is read from the environment when cuInit is called:
 *   FAKE_CUDA_SMS=132      SMs of the device
 *   FAKE_CUDA_UUID=…       its UUID, as text
 *   FAKE_CUDA_GRAIN=2      SMs of the smallest group (4 on Ampere)
 *   FAKE_CUDA_FAIL=call:code[,call:code…]   these calls are answered with this error; 999 loses the device for good
 * Built with -DOLD it is a driver from before green contexts. With -DCHECK_CUDA_H the
 * compiler compares every declaration here with NVIDIA's own.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

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
    case 800: *name = "CUDA_ERROR_NOT_PERMITTED"; break;
    case 801: *name = "CUDA_ERROR_NOT_SUPPORTED"; break;
    case 805: *name = "CUDA_ERROR_MPS_CONNECTION_FAILED"; break;
    case 915: *name = "CUDA_ERROR_INVALID_RESOURCE_CONFIGURATION"; break;
    case 999: *name = "CUDA_ERROR_UNKNOWN"; break;
    default: *name = NULL; return CUDA_ERROR_INVALID_VALUE;
    }
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetCount(int *count) {
    CHECK("cuDeviceGetCount");
    *count = 1;
    return CUDA_SUCCESS;
}

CUresult cuDeviceGet(CUdevice *device, int ordinal) {
    CHECK("cuDeviceGet");
    if (ordinal != 0) return CUDA_ERROR_INVALID_DEVICE;
    *device = 0;
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
    if (device) return CUDA_ERROR_INVALID_DEVICE;
    const char *hex = getenv("FAKE_CUDA_UUID");
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
    if (device) return CUDA_ERROR_INVALID_DEVICE;
    if (attribute != 16) return CUDA_ERROR_INVALID_VALUE; /* CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT */
    *value = sms;
    return CUDA_SUCCESS;
}
#endif

/* For tests: the SMs that kernels on this stream would see, and how many green contexts there are. */
int fake_sms_of(CUstream stream, int *out) {
    memcpy(out, stream->context->sms, sizeof(int) * (size_t)stream->context->count);
    return stream->context->count;
}

int fake_contexts(void) { return contexts; }
