/* The check that torch finds all that it needs. A function that is missing here would be taken from the real library,
 * which finds no GPU, or works on memory that is none: neither says what is wrong. */
#define _GNU_SOURCE
#include "pretended.h"

#include <dlfcn.h>
#include <elf.h>
#include <link.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

void *own_symbol(const char *name) {
    static void *handle; /* of this library, which was preloaded under that name */
    if (handle == NULL) handle = dlopen("libcuda.so.1", RTLD_NOW | RTLD_NOLOAD);
    return dlsym(handle, name);
}

enum { ROOM = 2000 };

struct search {
    char missing[ROOM];
    size_t used;
};

/* The dynamic symbols that a library wants from others come before those that it has (DT_GNU_HASH's first field but
 * one says where those begin). */
struct symbols {
    const ElfW(Sym) * table;
    const char *names;
    size_t wanted;
};

static struct symbols symbols_of(const struct dl_phdr_info *library) {
    struct symbols found = {0};
    const ElfW(Dyn) *entry = NULL;
    for (int i = 0; i < library->dlpi_phnum; i++)
        if (library->dlpi_phdr[i].p_type == PT_DYNAMIC)
            entry = (const ElfW(Dyn) *)(library->dlpi_addr + library->dlpi_phdr[i].p_vaddr);
    for (; entry && entry->d_tag != DT_NULL; entry++) {
        if (entry->d_tag == DT_SYMTAB) found.table = (const void *)entry->d_un.d_ptr;
        if (entry->d_tag == DT_STRTAB) found.names = (const void *)entry->d_un.d_ptr;
        if (entry->d_tag == DT_GNU_HASH) found.wanted = ((const uint32_t *)entry->d_un.d_ptr)[1];
    }
    return found;
}

static bool is_cuda(const char *name) {
    return strncmp(name, "cuda", 4) == 0 || strncmp(name, "__cuda", 6) == 0 || strncmp(name, "cublas", 6) == 0 ||
           strncmp(name, "nccl", 4) == 0;
}

/* Each name with a space behind it, once. */
static void note(struct search *search, const char *name) {
    char entry[256];
    int length = snprintf(entry, sizeof entry, "%s ", name);
    if (strstr(search->missing, entry) || search->used + (size_t)length >= ROOM) return;
    strcpy(search->missing + search->used, entry);
    search->used += (size_t)length;
}

static int look_at(struct dl_phdr_info *library, size_t size, void *argument) {
    (void)size;
    const char *base = strrchr(library->dlpi_name, '/');
    if (base == NULL || (strncmp(base, "/libtorch", 9) != 0 && strncmp(base, "/libc10", 7) != 0)) return 0;
    struct symbols symbols = symbols_of(library);
    if (symbols.table == NULL || symbols.names == NULL) return 0;
    for (size_t i = 1; i < symbols.wanted; i++) {
        const char *name = symbols.names + symbols.table[i].st_name;
        if (symbols.table[i].st_shndx == SHN_UNDEF && is_cuda(name) && own_symbol(name) == NULL) note(argument, name);
    }
    return 0;
}

void check_symbols(void) {
    static bool checked;
    if (checked) return;
    checked = true;
    struct search search = {0};
    dl_iterate_phdr(look_at, &search);
    if (search.used == 0) return;
    say("this torch wants functions that were not there when the library was built: %sare missing; build it again "
        "for this torch (python -m tools.pretended_gpu build)", search.missing);
    exit(1);
}
