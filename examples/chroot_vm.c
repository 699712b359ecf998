/* SPDX-License-Identifier: Apache-2.0
 *
 * chroot_vm ROOT COMMAND [ARGUMENT...]: runs a command from a directory in a microVM.
 *
 *   cc -o chroot_vm chroot_vm.c $(pkg-config --cflags --libs libkrun)
 */
#include <errno.h>
#include <stdio.h>
#include <string.h>

#include <libkrun.h>

static int failed(const char *what, int32_t code)
{
    fprintf(stderr, "chroot_vm: %s: %s\n", what, strerror(-code));
    return 125;
}

int main(int argc, char *const argv[])
{
    if (argc < 3) {
        fprintf(stderr, "usage: chroot_vm ROOT COMMAND [ARGUMENT...]\n");
        return 125;
    }
    int32_t code;
    if ((code = krun_set_log_level(KRUN_LOG_LEVEL_ERROR)) < 0)
        return failed("log level", code);
    int32_t ctx = krun_create_ctx();
    if (ctx < 0)
        return failed("create a context", ctx);
    if ((code = krun_set_vm_config(ctx, 1, 512)) < 0)
        return failed("set processors and memory", code);
    if ((code = krun_set_root(ctx, argv[1])) < 0)
        return failed("set the root", code);
    const char *const env[] = {"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", NULL};
    if ((code = krun_set_exec(ctx, argv[2], (const char *const *)&argv[3], env)) < 0)
        return failed("set the command", code);
    /* Ends the process with the command's status; returns only when the VM could not start. */
    return failed("start", krun_start_enter(ctx));
}
