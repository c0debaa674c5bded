/* A libnvidia-ml.so.1 of our own: one GPU whose state is read from the file $NVML_STUB at every call.
 *
 * The file holds one word: normal small full lost reset unsupported unknown mismatch hot slow blocking. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

typedef struct { unsigned long long total, free, used; } Memory;
typedef struct { unsigned int pid; unsigned long long used; unsigned int gpu, compute; } Process;

static const unsigned long long GIB = 1ULL << 30;

static int state(const char *word) {
    char found[32] = "normal";
    const char *path = getenv("NVML_STUB");
    FILE *file = path ? fopen(path, "r") : NULL;
    if (file) { if (fscanf(file, "%31s", found) != 1) strcpy(found, "normal"); fclose(file); }
    return strcmp(found, word) == 0;
}

static int enter(void) {
    if (state("slow")) usleep(300000);
    while (state("blocking")) usleep(20000);
    if (state("lost")) return 15;
    if (state("reset")) return 16;
    if (state("mismatch")) return 18;
    if (state("unknown")) return 999;
    return 0;
}

int nvmlInit_v2(void) { return state("absent") ? 9 : state("mismatch") ? 18 : 0; }
int nvmlInitWithFlags(unsigned int flags) { (void)flags; return nvmlInit_v2(); }
int nvmlShutdown(void) { return 0; }
const char *nvmlErrorString(int code) { static char text[32]; snprintf(text, sizeof text, "stub error %d", code); return text; }
int nvmlSystemGetDriverVersion(char *text, unsigned int size) { snprintf(text, size, "560.35.03"); return 0; }
int nvmlDeviceGetCount_v2(unsigned int *count) { *count = 1; return enter(); }
int nvmlDeviceGetHandleByIndex_v2(unsigned int index, void **handle) { *handle = (void *)1; return index ? 2 : enter(); }
int nvmlDeviceGetHandleByUUID(const char *uuid, void **handle) {
    *handle = (void *)1;
    return strncmp(uuid, "GPU-stub", 8) && strncmp(uuid, "MIG-stub", 8) ? 6 : enter();
}
int nvmlDeviceGetName(void *handle, char *text, unsigned int size) { (void)handle; snprintf(text, size, "Stub RTX 4070"); return enter(); }
int nvmlDeviceGetUUID(void *handle, char *text, unsigned int size) { (void)handle; snprintf(text, size, "GPU-stub-0001"); return enter(); }
int nvmlDeviceGetMemoryInfo(void *handle, Memory *memory) {
    (void)handle;
    memory->total = state("small") ? 4 * GIB : 12 * GIB;
    memory->free = state("full") || state("hot") ? 0 : memory->total - GIB;
    memory->used = memory->total - memory->free;
    return enter();
}
int nvmlDeviceGetTemperature(void *handle, int sensor, unsigned int *celsius) {
    (void)handle; (void)sensor;
    *celsius = 71;
    return state("unsupported") ? 3 : enter();
}
int nvmlDeviceGetCurrentClocksThrottleReasons(void *handle, unsigned long long *reasons) {
    (void)handle;
    *reasons = state("hot") ? 0x40 : 0;
    return state("unsupported") ? 3 : enter();
}
int nvmlDeviceGetPowerUsage(void *handle, unsigned int *milliwatts) {
    (void)handle;
    *milliwatts = 187000;
    return state("unsupported") ? 3 : enter();
}
int nvmlDeviceGetComputeRunningProcesses_v3(void *handle, unsigned int *count, Process *found) {
    (void)handle;
    if (state("unsupported")) return 3;
    if (*count < 1) { *count = 1; return 7; }
    *count = 1;
    found[0].pid = (unsigned int)getppid();
    found[0].used = GIB;
    return enter();
}
