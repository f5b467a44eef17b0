/* A libcuda.so.1 for tests on machines without a GPU. Launches nothing: it checks what a driver checks, and logs each call.

   STUB_CUDA_LOG         file that calls are appended to, one a line; unset: no log
   STUB_CUDA_DEVICES     how many devices there are; default 1
   STUB_CUDA_CAPABILITY  of all devices, as 90; default 90
   STUB_CUDA_VERSION     of the driver, as 13040; default 13040
   STUB_CUDA_FAIL        a function and the error that it returns, as cuModuleLoadData=209

   Sizes of parameters are read from the cubin: attribute EIATTR_KPARAM_INFO in the section .nv.info.<kernel>. */
#include <elf.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef int CUresult;
enum { SUCCESS = 0, INVALID_VALUE = 1, INVALID_IMAGE = 200, INVALID_CONTEXT = 201, NOT_FOUND = 500 };
enum { MOST_PARAMETERS = 256, MOST_KERNELS = 16, MOST_DEVICES = 8, DEEPEST = 16 };

typedef struct { int device; } Context;

typedef struct {
    char name[128];
    Context *context;
    int parameters, sizes[MOST_PARAMETERS];
    int dynamic_shared; /* the most that a launch may ask for */
} Function;

typedef struct {
    int kernels;
    Function functions[MOST_KERNELS];
} Module;

typedef struct {
    unsigned int id;
    char pad[4];
    union { char bytes[64]; unsigned int words[16]; } value;
} Attribute;

typedef struct {
    unsigned int grid[3], block[3], shared;
    void *stream;
    Attribute *attributes;
    unsigned int number;
} Config;

static Context contexts[MOST_DEVICES];
static __thread Context *stack[DEEPEST];
static __thread int depth; /* the current context is stack[depth - 1] */
static pthread_mutex_t writing = PTHREAD_MUTEX_INITIALIZER;

static int setting(const char *name, int otherwise) {
    const char *text = getenv(name);
    return text ? atoi(text) : otherwise;
}

static Context *current(void) { return depth ? stack[depth - 1] : NULL; }

static void note(const char *format, ...) {
    const char *path = getenv("STUB_CUDA_LOG");
    if (!path)
        return;
    pthread_mutex_lock(&writing);
    FILE *file = fopen(path, "a");
    va_list values;
    va_start(values, format);
    vfprintf(file, format, values);
    va_end(values);
    fclose(file);
    pthread_mutex_unlock(&writing);
}

/* The error that a function is to return, if the environment says so. */
static CUresult forced(const char *name) {
    const char *text = getenv("STUB_CUDA_FAIL");
    size_t length = strlen(name);
    return text && !strncmp(text, name, length) && text[length] == '=' ? atoi(text + length + 1) : SUCCESS;
}

#define FORCED                                                                                                         \
    do {                                                                                                               \
        CUresult code = forced(__func__);                                                                              \
        if (code)                                                                                                      \
            return code;                                                                                               \
    } while (0)

CUresult cuInit(unsigned int flags) {
    FORCED;
    for (int i = 0; i < MOST_DEVICES; i++)
        contexts[i].device = i;
    return flags ? INVALID_VALUE : SUCCESS;
}

CUresult cuDriverGetVersion(int *version) {
    *version = setting("STUB_CUDA_VERSION", 13040);
    return SUCCESS;
}

CUresult cuGetErrorName(CUresult code, const char **text) {
    switch (code) {
    case 1: *text = "CUDA_ERROR_INVALID_VALUE"; return SUCCESS;
    case 200: *text = "CUDA_ERROR_INVALID_IMAGE"; return SUCCESS;
    case 201: *text = "CUDA_ERROR_INVALID_CONTEXT"; return SUCCESS;
    case 209: *text = "CUDA_ERROR_NO_BINARY_FOR_GPU"; return SUCCESS;
    case 222: *text = "CUDA_ERROR_UNSUPPORTED_PTX_VERSION"; return SUCCESS;
    case 500: *text = "CUDA_ERROR_NOT_FOUND"; return SUCCESS;
    case 719: *text = "CUDA_ERROR_LAUNCH_FAILED"; return SUCCESS;
    }
    return INVALID_VALUE;
}

CUresult cuGetErrorString(CUresult code, const char **text) {
    *text = "words of the stub";
    return code ? SUCCESS : INVALID_VALUE;
}

CUresult cuDeviceGetCount(int *count) {
    *count = setting("STUB_CUDA_DEVICES", 1);
    return SUCCESS;
}

CUresult cuDeviceGet(int *device, int ordinal) {
    *device = ordinal;
    return ordinal >= 0 && ordinal < setting("STUB_CUDA_DEVICES", 1) ? SUCCESS : 101;
}

CUresult cuDeviceGetAttribute(int *value, int attribute, int device) {
    int capability = setting("STUB_CUDA_CAPABILITY", 90);
    (void)device;
    switch (attribute) {
    case 75: *value = capability / 10; break;
    case 76: *value = capability % 10; break;
    case 97: *value = 232448; break; /* shared memory of a block, by opting in */
    case 81: *value = 233472; break; /* of a multiprocessor */
    default: *value = 1;
    }
    return SUCCESS;
}

CUresult cuDevicePrimaryCtxRetain(Context **context, int device) {
    note("cuDevicePrimaryCtxRetain device=%d\n", device);
    *context = &contexts[device];
    return SUCCESS;
}

CUresult cuCtxGetCurrent(Context **context) {
    *context = current();
    return SUCCESS;
}

CUresult cuCtxSetCurrent(Context *context) {
    if (!depth)
        depth = 1;
    stack[depth - 1] = context;
    return SUCCESS;
}

CUresult cuCtxPushCurrent_v2(Context *context) {
    if (depth == DEEPEST)
        return INVALID_VALUE;
    stack[depth++] = context;
    return SUCCESS;
}

CUresult cuCtxPopCurrent_v2(Context **context) {
    if (!depth)
        return INVALID_CONTEXT;
    *context = stack[--depth];
    return SUCCESS;
}

CUresult cuCtxGetDevice(int *device) {
    if (!current())
        return INVALID_CONTEXT;
    *device = current()->device;
    return SUCCESS;
}

CUresult cuThreadExchangeStreamCaptureMode(int *mode) {
    static __thread int kept;
    int given = *mode;
    *mode = kept;
    kept = given;
    note("cuThreadExchangeStreamCaptureMode mode=%d\n", given);
    return SUCCESS;
}

static void read_parameters(Function *function, const char *at, const char *end) {
    while (at + 4 <= end) {
        unsigned char format = at[0], attribute = at[1];
        unsigned short length = *(const unsigned short *)(at + 2);
        at += 4;
        if (format != 4)
            continue;
        if (attribute == 0x17) { /* index, ordinal, offset, and the size in bits 18 to 31 */
            unsigned short ordinal = *(const unsigned short *)(at + 4);
            function->sizes[ordinal] = *(const uint32_t *)(at + 8) >> 18;
            if (ordinal >= function->parameters)
                function->parameters = ordinal + 1;
        }
        at += length;
    }
}

CUresult cuModuleLoadData(Module **module, const void *image) {
    FORCED;
    const char *bytes = image;
    const Elf64_Ehdr *header = image;
    if (memcmp(bytes, ELFMAG, SELFMAG) || header->e_machine != EM_CUDA)
        return INVALID_IMAGE;
    if (!current())
        return INVALID_CONTEXT;
    const Elf64_Shdr *sections = (const Elf64_Shdr *)(bytes + header->e_shoff);
    const char *names = bytes + sections[header->e_shstrndx].sh_offset;
    Module *made = calloc(1, sizeof *made);
    for (int i = 0; i < header->e_shnum && made->kernels < MOST_KERNELS; i++) {
        const char *name = names + sections[i].sh_name;
        if (strncmp(name, ".nv.info.", 9))
            continue;
        Function *function = &made->functions[made->kernels++];
        snprintf(function->name, sizeof function->name, "%s", name + 9);
        function->context = current();
        function->dynamic_shared = 49152;
        const char *start = bytes + sections[i].sh_offset;
        read_parameters(function, start, start + sections[i].sh_size);
    }
    *module = made;
    note("cuModuleLoadData device=%d\n", current()->device);
    return SUCCESS;
}

CUresult cuModuleUnload(Module *module) {
    free(module);
    return SUCCESS;
}

CUresult cuModuleGetFunction(Function **function, Module *module, const char *name) {
    for (int i = 0; i < module->kernels; i++)
        if (!strcmp(module->functions[i].name, name)) {
            *function = &module->functions[i];
            return SUCCESS;
        }
    return NOT_FOUND;
}

CUresult cuFuncGetAttribute(int *value, int attribute, Function *function) {
    (void)function;
    *value = attribute == 0 ? 1024 : 0; /* threads of a block */
    return SUCCESS;
}

CUresult cuFuncSetAttribute(Function *function, int attribute, int value) {
    if (attribute != 8 && attribute != 14)
        return INVALID_VALUE;
    note("cuFuncSetAttribute kernel=%s attribute=%d value=%d\n", function->name, attribute, value);
    if (attribute == 8) {
        if (value > 232448)
            return INVALID_VALUE;
        function->dynamic_shared = value;
    }
    return SUCCESS;
}

CUresult cuFuncSetCacheConfig(Function *function, int config) {
    note("cuFuncSetCacheConfig kernel=%s config=%d\n", function->name, config);
    return SUCCESS;
}

CUresult cuLaunchKernelEx(const Config *config, Function *function, void **parameters, void **extra) {
    FORCED;
    if (current() != function->context)
        return INVALID_CONTEXT;
    if (extra || (int)config->shared > function->dynamic_shared || !config->grid[0])
        return INVALID_VALUE;
    if (!getenv("STUB_CUDA_LOG"))
        return SUCCESS;
    char line[16384];
    int at = snprintf(line, sizeof line, "cuLaunchKernelEx kernel=%s device=%d grid=%u,%u,%u block=%u,%u,%u shared=%u stream=%p",
                      function->name, function->context->device, config->grid[0], config->grid[1], config->grid[2],
                      config->block[0], config->block[1], config->block[2], config->shared, config->stream);
    at += sprintf(line + at, " attributes=");
    for (unsigned int i = 0; i < config->number; i++) {
        at += sprintf(line + at, "%s%u:", i ? ";" : "", config->attributes[i].id);
        int words = config->attributes[i].id == 4 ? 3 : 1; /* the dimensions of a cluster; else one word */
        for (int j = 0; j < words; j++)
            at += sprintf(line + at, "%s%u", j ? "," : "", config->attributes[i].value.words[j]);
    }
    at += sprintf(line + at, " parameters=");
    for (int i = 0; i < function->parameters; i++) {
        at += sprintf(line + at, "%s", i ? "," : "");
        for (int j = 0; j < function->sizes[i]; j++)
            at += sprintf(line + at, "%02x", ((unsigned char *)parameters[i])[j]);
    }
    note("%s\n", line);
    return SUCCESS;
}

/* What Triton's utilities link to, and these tests do not call. */
#define UNUSED(name)                                                                                                   \
    CUresult name(void) { return 801; }
UNUSED(cuCtxGetLimit)
UNUSED(cuCtxSetLimit)
UNUSED(cuOccupancyMaxActiveClusters)
UNUSED(cuPointerGetAttribute)
UNUSED(cuStreamIsCapturing)
UNUSED(cuTensorMapEncodeTiled)
UNUSED(cuTensorMapEncodeIm2col)
