/* SPDX-License-Identifier: Apache-2.0
 *
 * What programs do with the C library, for the VM test c_abi:
 *
 *   calls fork ROOT SCRIPT         as crun: a context of the parent, started by a child that has closed everything else
 *   calls user ROOT SCRIPT         root with supplementary groups becomes another user
 *   calls terminals ROOT SCRIPT FIRST SECOND
 *                                  terminals as ports of two consoles, no signal handlers
 *   calls input ROOT SCRIPT EVENT  an input device of the host
 */
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include <libkrun.h>

static const char *const ENV[] = {"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", NULL};

static int32_t must(const char *what, int32_t code)
{
    if (code >= 0)
        return code;
    fprintf(stderr, "calls: %s: %s\n", what, strerror(-code));
    exit(125);
}

static int32_t context(void)
{
    must("log level", krun_set_log_level(KRUN_LOG_LEVEL_ERROR));
    return must("create a context", krun_create_ctx());
}

static void configure(int32_t ctx, const char *root, const char *script)
{
    const char *const args[] = {"-c", script, NULL};
    must("processors and memory", krun_set_vm_config(ctx, 1, 256));
    must("root", krun_set_root(ctx, root));
    must("command", krun_set_exec(ctx, "/bin/sh", args, ENV));
}

static void handler(void)
{
    static const char said[] = "handler\n";
    if (write(STDERR_FILENO, said, sizeof said - 1) < 0)
        _exit(1);
}

static int forked(const char *root, const char *script)
{
    int32_t ctx = context();
    if (atexit(handler) != 0)
        return 125;
    /* Stays in the buffer of both. */
    printf("parent\n");
    pid_t child = fork();
    if (child == 0) {
        for (int fd = 3; fd < 1024; fd++)
            close(fd);
        configure(ctx, root, script);
        must("start", krun_start_enter(ctx));
    }
    int status = 0;
    if (child < 0 || waitpid(child, &status, 0) != child || !WIFEXITED(status))
        return 125;
    printf("child %d\n", WEXITSTATUS(status));
    /* The parent's context is still its own. */
    must("free", krun_free_ctx(ctx));
    return 0;
}

static int user(const char *root, const char *script)
{
    const gid_t groups[] = {0, 4, 27};
    if (setgroups(3, groups) != 0 || chdir(root) != 0)
        return 125;
    int32_t ctx = context();
    configure(ctx, ".", script);
    must("user", krun_setuid(ctx, 12345));
    must("group", krun_setgid(ctx, 23456));
    return -must("start", krun_start_enter(ctx));
}

static int terminals(const char *root, const char *script, char *const paths[])
{
    int32_t ctx = context();
    configure(ctx, root, script);
    must("no other console", krun_disable_implicit_console(ctx));
    for (int n = 0; n < 2; n++) {
        int32_t console = must("console", krun_add_virtio_console_multiport(ctx));
        /* So that port 0 is no terminal. */
        if (n == 0)
            must("stream", krun_add_console_port_inout(ctx, console, "output", -1, STDOUT_FILENO));
        int tty = open(paths[n], O_RDWR | O_NOCTTY);
        must("terminal", krun_add_console_port_tty(ctx, console, NULL, tty));
    }
    return -must("start", krun_start_enter(ctx));
}

static int input(const char *root, const char *script, const char *path)
{
    int32_t ctx = context();
    configure(ctx, root, script);
    must("input device", krun_add_input_device_fd(ctx, open(path, O_RDWR)));
    return -must("start", krun_start_enter(ctx));
}

int main(int argc, char *const argv[])
{
    if (argc == 4 && strcmp(argv[1], "fork") == 0)
        return forked(argv[2], argv[3]);
    if (argc == 4 && strcmp(argv[1], "user") == 0)
        return user(argv[2], argv[3]);
    if (argc == 6 && strcmp(argv[1], "terminals") == 0)
        return terminals(argv[2], argv[3], &argv[4]);
    if (argc == 5 && strcmp(argv[1], "input") == 0)
        return input(argv[2], argv[3], argv[4]);
    fprintf(stderr, "usage: calls fork|user|terminals|input ROOT SCRIPT [TERMINAL TERMINAL|EVENT]\n");
    return 125;
}
