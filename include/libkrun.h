/* SPDX-License-Identifier: Apache-2.0
 *
 * libkrun: run a program in a microVM, as a library.
 *
 * Every call returns 0 or a non-negative value, or a negative errno:
 *   -ENOENT   there is no context with that id
 *   -EINVAL   an argument is NULL, malformed or out of range
 *   -EEXIST   something that may exist once exists already
 *   -ENOTSUP  this build, or this version, cannot do it
 * Strings are copied unless a function says otherwise. A context may be configured from any thread, by
 * one thread at a time.
 *
 * Every function below is exported by every build. Those under "Not served by this version" check their
 * context and answer -ENOTSUP.
 */
#ifndef LIBKRUN_H
#define LIBKRUN_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#ifdef __cplusplus
extern "C" {
#endif

/* ------------------------------------------------------------------ logging */

#define KRUN_LOG_LEVEL_OFF 0
#define KRUN_LOG_LEVEL_ERROR 1
#define KRUN_LOG_LEVEL_WARN 2
#define KRUN_LOG_LEVEL_INFO 3
#define KRUN_LOG_LEVEL_DEBUG 4
#define KRUN_LOG_LEVEL_TRACE 5

#define KRUN_LOG_TARGET_DEFAULT (-1) /* standard error */

#define KRUN_LOG_STYLE_AUTO 0   /* colours if the target is a terminal */
#define KRUN_LOG_STYLE_ALWAYS 1
#define KRUN_LOG_STYLE_NEVER 2

#define KRUN_LOG_OPTION_NO_ENV 1 /* RUST_LOG may not change the level */

/* Logs from `level` up: to where krun_init_log() said, else to standard error. The last call counts. */
int32_t krun_set_log_level(uint32_t level);

/* Logs to `target_fd` from `level` up. The descriptor stays the caller's: it is neither duplicated nor closed, and
 * once it is closed nothing is logged any more, whatever gets its number. -EEXIST when there is a log. */
int32_t krun_init_log(int target_fd, uint32_t level, uint32_t style, uint32_t options);

/* ----------------------------------------------------------------- contexts */

/* Creates a context and loads the kernel bundle, if there is one. Keeps no descriptor and starts no
 * thread; the context survives fork(). Returns its id. */
int32_t krun_create_ctx(void);

/* Forgets a context that was not started. */
int32_t krun_free_ctx(uint32_t ctx_id);

/* Virtual CPUs (1 to krun_get_max_vcpus()) and RAM in MiB. */
int32_t krun_set_vm_config(uint32_t ctx_id, uint8_t num_vcpus, uint32_t ram_mib);

/* The largest number of virtual CPUs that a VM can have on this host. */
int32_t krun_get_max_vcpus(void);

#define KRUN_FEATURE_NET 0
#define KRUN_FEATURE_BLK 1
#define KRUN_FEATURE_GPU 2
#define KRUN_FEATURE_SND 3
#define KRUN_FEATURE_INPUT 4
#define KRUN_FEATURE_EFI 5
#define KRUN_FEATURE_TEE 6
#define KRUN_FEATURE_AMD_SEV 7
#define KRUN_FEATURE_INTEL_TDX 8
#define KRUN_FEATURE_AWS_NITRO 9
#define KRUN_FEATURE_VIRGL_RESOURCE_MAP2 10
#define KRUN_FEATURE_INIT_BLOB 11

/* 1 if the library can do `feature`, 0 if not, -EINVAL for a number it does not know. */
int32_t krun_has_feature(uint64_t feature);

/* -------------------------------------------------------- kernel and machine */

#define KRUN_KERNEL_FORMAT_RAW 0        /* bzImage or flat image */
#define KRUN_KERNEL_FORMAT_ELF 1
#define KRUN_KERNEL_FORMAT_PE_GZ 2
#define KRUN_KERNEL_FORMAT_IMAGE_BZ2 3
#define KRUN_KERNEL_FORMAT_IMAGE_GZ 4
#define KRUN_KERNEL_FORMAT_IMAGE_ZSTD 5

/* Boots the kernel in a file instead of the bundled one. `initramfs` and `cmdline` may be NULL; a
 * command line replaces the library's own, except for what describes the devices. */
int32_t krun_set_kernel(uint32_t ctx_id, const char *kernel_path, uint32_t kernel_format,
                        const char *initramfs, const char *cmdline);

/* The value of `console=` on the kernel's command line (default hvc0). */
int32_t krun_set_kernel_console(uint32_t ctx_id, const char *console_id);

/* Keeps the IOAPIC in this process and only the local APICs in the host kernel (x86_64). */
int32_t krun_split_irqchip(uint32_t ctx_id, bool enable);

/* Strings, none empty, that the guest finds in its SMBIOS tables (type 11); its kernel needs CONFIG_DMI. At most
 * 255 of 63 KiB in all. An empty list is the default: no tables. */
int32_t krun_set_smbios_oem_strings(uint32_t ctx_id, const char *const oem_strings[]);

/* Lets the guest run virtual machines itself. */
int32_t krun_set_nested_virt(uint32_t ctx_id, bool enabled);

/* 1 if the host lets guests run virtual machines, 0 if not. */
int32_t krun_check_nested_virt(void);

/* --------------------------------------------------------------- file systems */

#define KRUN_FS_ROOT_TAG "/dev/root"

/* The host directory that is the guest's root. Once. It has no DAX window; for one, add the directory by
 * krun_add_virtiofs2() with KRUN_FS_ROOT_TAG. */
int32_t krun_set_root(uint32_t ctx_id, const char *root_path);

/* A host directory as a virtio-fs share under `tag` (1 to 36 bytes). The tag KRUN_FS_ROOT_TAG makes it
 * the root. `shm_size` is the size of a DAX window, into which the guest maps files of 1 MiB or more instead of
 * keeping copies of them; it is rounded up to 2 MiB, and 16 GiB are the most. All
 * shares of a VM have 32 GiB or eight times its memory, whichever is less; later ones are made smaller or left out
 * when it starts. With 0 there is none. The guest keeps 1/64 of the size in its own memory for it. Files on overlayfs, 9p, FUSE and network
 * file systems are not mapped. Where the host makes a mapped file shorter, the guest finds zeroes. */
int32_t krun_add_virtiofs(uint32_t ctx_id, const char *tag, const char *path);
int32_t krun_add_virtiofs2(uint32_t ctx_id, const char *tag, const char *path, uint64_t shm_size);
int32_t krun_add_virtiofs3(uint32_t ctx_id, const char *tag, const char *path, uint64_t shm_size,
                           bool read_only);

#define KRUN_FS_SEMANTICS_COMPLETE 0
#define KRUN_FS_SEMANTICS_SIMPLIFIED 1
int32_t krun_add_virtiofs4(uint32_t ctx_id, const char *tag, const char *path, uint64_t shm_size,
                           bool read_only, uint32_t semantics);

/* A file that exists in a share only for the guest. `data` is borrowed until the VM has ended. `path` is
 * relative to the share; its parent exists there or was added before (-ENOENT, -ENOTDIR). In
 * KRUN_FS_ROOT_TAG it can be added before the root is set, if none of the root's directories is its parent;
 * with a root disk it is in what init starts from, not on the disk. With `one_shot` it disappears once it
 * was opened and closed. */
int32_t krun_fs_add_overlay_file(uint32_t ctx_id, const char *fs_tag, const char *path, const uint8_t *data,
                                 size_t data_len, uint32_t mode, bool one_shot);

/* An empty directory that exists in a share only for the guest: a mount point. */
int32_t krun_fs_add_overlay_dir(uint32_t ctx_id, const char *fs_tag, const char *path, uint32_t mode);

/* --------------------------------------------------------------- the workload */

/* The program, its arguments (without argv[0]) and environment, each list ended by NULL and of at most
 * 1048576 strings (-E2BIG above). `envp` NULL: the caller's environment. */
int32_t krun_set_exec(uint32_t ctx_id, const char *exec_path, const char *const argv[],
                      const char *const envp[]);

/* The environment alone; NULL: the caller's. */
int32_t krun_set_env(uint32_t ctx_id, const char *const envp[]);

/* The working directory, absolute, in the guest. */
int32_t krun_set_workdir(uint32_t ctx_id, const char *workdir_path);

/* Limits as "RESOURCE=SOFT:HARD", RESOURCE being a number or a name such as RLIMIT_NOFILE. */
int32_t krun_set_rlimits(uint32_t ctx_id, const char *const rlimits[]);

/* The bytes of the built-in init. They belong to the library. */
int32_t krun_get_default_init(const uint8_t **data_out, size_t *len_out);

/* Leaves /init.krun to the caller (a file of the root, or an overlay file). */
int32_t krun_disable_implicit_init(uint32_t ctx_id);

/* User and group that this process takes on just before the VM starts. Where root takes on a user, it leaves its
 * supplementary groups too, unless the user namespace forbids that. The kernel bundle is loaded by then;
 * /dev/kvm, the root and all other files are opened as that user. */
int32_t krun_setuid(uint32_t ctx_id, uid_t uid);
int32_t krun_setgid(uint32_t ctx_id, gid_t gid);

/* -------------------------------------------------------------------- consoles */

/* Sends the implicit console's output to a file; it has no input then. */
int32_t krun_set_console_output(uint32_t ctx_id, const char *filepath);

/* Starts without the console on descriptors 0, 1 and 2 that a VM has otherwise. */
int32_t krun_disable_implicit_console(uint32_t ctx_id);

/* A console on three descriptors (-1 for none). Terminals become the guest's hvc console, as a terminal port has it
 * below; others reach the workload as its standard streams. */
int32_t krun_add_virtio_console_default(uint32_t ctx_id, int input_fd, int output_fd, int err_fd);

/* A serial port (ttyS0) on two descriptors (-1 for none). */
int32_t krun_add_serial_console_default(uint32_t ctx_id, int input_fd, int output_fd);

/* An empty console device; returns its id for the two calls below. Within a device the guest numbers its terminals
 * (hvc0, hvc1) in the order of the calls, and the devices in theirs, the implicit console first. */
int32_t krun_add_virtio_console_multiport(uint32_t ctx_id);

/* A terminal port; `name` may be NULL. This process's terminal is raw while it is in the foreground, and the guest follows
 * its size. Both are looked at twice a second, so that no signal handler is needed. */
int32_t krun_add_console_port_tty(uint32_t ctx_id, uint32_t console_id, const char *name, int tty_fd);

/* A byte stream port, found in the guest by its name, which is not empty (-1: no such direction). */
int32_t krun_add_console_port_inout(uint32_t ctx_id, uint32_t console_id, const char *name, int input_fd,
                                    int output_fd);

/* -------------------------------------------------------------------- input */

/* An input device whose events come from callbacks: a struct krun_input_config and a struct
 * krun_input_event_provider of libkrun_input.h, with their sizes. Both are copied. */
int krun_add_input_device(uint32_t ctx_id, const void *config_backend, size_t config_backend_size,
                          const void *events_backend, size_t events_backend_size);

/* An input device of this host: a descriptor of /dev/input/event*, open for reading, and for writing if the
 * guest may switch its lights. It has to stay open until the VM starts. The host sees the events too, unless
 * the caller grabbed the device (EVIOCGRAB). */
int krun_add_input_device_fd(uint32_t ctx_id, int input_fd);

/* --------------------------------------------------------------------- disks */

/* What an image holds. It is never guessed. A VMDK image can only be read. */
#define KRUN_DISK_FORMAT_RAW 0
#define KRUN_DISK_FORMAT_QCOW2 1
#define KRUN_DISK_FORMAT_VMDK 2
/* Added to a format: the image may name other files of this host as what it is based on. Only for images
 * that you trust, as the guest can read those files. Without it such an image is refused. */
#define KRUN_DISK_BACKING 0x100

/* What becomes of a flush that the guest asks for. NONE: nothing, so that a crash of the host may lose
 * what the guest takes for stored; the end of this process loses nothing. RELAXED: the host writes it to
 * the disk, which on macOS may keep it in its own cache. FULL: it is on stable storage. */
#define KRUN_SYNC_NONE 0
#define KRUN_SYNC_RELAXED 1
#define KRUN_SYNC_FULL 2

/* Adds a disk from an image, a file or a block device; the first one is /dev/vda. block_id, of any length,
 * is another for each disk (-EEXIST); its first 20 bytes are the serial number that the guest sees. The
 * image is locked while the VM runs: one VM writes to it, or several read it. krun_add_disk and
 * krun_add_disk2 leave out what krun_add_disk3 has: raw, no direct I/O, RELAXED. direct_io goes around the
 * host's page cache. */
int32_t krun_add_disk(uint32_t ctx_id, const char *block_id, const char *disk_path, bool read_only);
int32_t krun_add_disk2(uint32_t ctx_id, const char *block_id, const char *disk_path, uint32_t disk_format,
                       bool read_only);
int32_t krun_add_disk3(uint32_t ctx_id, const char *block_id, const char *disk_path, uint32_t disk_format,
                       bool read_only, bool direct_io, uint32_t sync_mode);

/* Makes a block device of the guest (/dev/vda1, say) the root. fstype NULL or "auto": every file system
 * that the guest's kernel has is tried. options may be NULL. -EEXIST when there is a root already. Init,
 * the exit status and shares work as with a root directory. */
int32_t krun_set_root_disk_remount(uint32_t ctx_id, const char *device, const char *fstype,
                                   const char *options);

/* The older form: two raw, writable disks, not together with krun_add_disk (-EINVAL). The root disk is
 * /dev/vda and becomes the root unless a root directory is set; the data disk comes after it. */
int32_t krun_set_root_disk(uint32_t ctx_id, const char *disk_path);
int32_t krun_set_data_disk(uint32_t ctx_id, const char *disk_path);

/* ------------------------------------------------------------------- networks */

/* Work on checksums and segments that the guest and its peer take on for each other (virtio's feature bits).
 * GUEST_*: the guest takes frames with an open checksum, or larger than its MTU; HOST_*: it sends such segments.
 * A tap interface can have all of them. A peer on a socket gets whole frames with their checksums filled in: it
 * needs none of these, and with HOST_* it has to take frames of up to 64 KiB, as passt and gvproxy do. HOST_* without
 * CSUM, and GUEST_* without GUEST_CSUM, have no effect. Other bits are -EINVAL. */
#define NET_FEATURE_CSUM (1 << 0)
#define NET_FEATURE_GUEST_CSUM (1 << 1)
#define NET_FEATURE_GUEST_TSO4 (1 << 7)
#define NET_FEATURE_GUEST_TSO6 (1 << 8)
#define NET_FEATURE_GUEST_UFO (1 << 10)
#define NET_FEATURE_HOST_TSO4 (1 << 11)
#define NET_FEATURE_HOST_TSO6 (1 << 12)
#define NET_FEATURE_HOST_UFO (1 << 14)

/* What krun_set_passt_fd and krun_set_gvproxy_path enable. */
#define COMPAT_NET_FEATURES                                                                                    \
    (NET_FEATURE_CSUM | NET_FEATURE_GUEST_CSUM | NET_FEATURE_GUEST_TSO4 | NET_FEATURE_GUEST_UFO |              \
     NET_FEATURE_HOST_TSO4 | NET_FEATURE_HOST_UFO)

/* The datagram "VFKT" goes before all frames, as gvproxy wants it (krun_add_net_unixgram only). */
#define NET_FLAG_VFKIT (1 << 0)
/* The built-in init asks a DHCP server for address, route and name servers before it runs the workload. */
#define NET_FLAG_DHCP_CLIENT (1 << 1)

/* Add a network interface; in the guest they are eth0, eth1 and so on in the order of the calls. Exactly one of
 * `path`, where the peer listens when the VM starts, and `fd`, a connected socket that stays open until then (NULL and
 * -1 for the other one). When the peer goes away, the guest's link goes down; with a path the connection is made again
 * once the peer is back. `mac` is the guest's address, 6 bytes. A flag that the function does not know is -EINVAL, so
 * that callers can probe for flags.
 *   unixstream  each frame after its length, 4 bytes, the highest first: passt, socket_vmnet
 *   unixgram    a datagram for each frame: gvproxy, vmnet-helper. With a path, our own socket is made beside it
 *   tap         a tap interface of this host */
int32_t krun_add_net_unixstream(uint32_t ctx_id, const char *path, int fd, uint8_t *const mac,
                                uint32_t features, uint32_t flags);
int32_t krun_add_net_unixgram(uint32_t ctx_id, const char *path, int fd, uint8_t *const mac,
                              uint32_t features, uint32_t flags);
int32_t krun_add_net_tap(uint32_t ctx_id, char *tap_name, uint8_t *const mac, uint32_t features,
                         uint32_t flags);

/* The older forms: one interface with COMPAT_NET_FEATURES, not together with those above (-EINVAL), on a connected
 * stream socket or on gvproxy's datagram socket with NET_FLAG_VFKIT. krun_set_net_mac sets its address. */
int32_t krun_set_passt_fd(uint32_t ctx_id, int fd);
int32_t krun_set_gvproxy_path(uint32_t ctx_id, char *path);
int32_t krun_set_net_mac(uint32_t ctx_id, uint8_t *const mac);

/* ------------------------------------------------------------------- sockets */

/* Programs of the guest reach programs of the host through AF_VSOCK sockets; the guest's context id is 3,
 * the host's 2. Each port is joined to a unix socket of the host.
 *
 * Connections of the guest to `port` of the host go to the socket at `filepath`, which is connected to
 * each time, with a stream socket or, if the guest's is one, with a SOCK_SEQPACKET socket; the guest sees
 * ECONNRESET when nobody listens there with a socket of that type. */
int32_t krun_add_vsock_port(uint32_t ctx_id, uint32_t port, const char *filepath);

/* The same with `listen` false. With `listen` true a stream socket is created at `filepath` when the VM starts,
 * and removed when it has ended; connections to it go to `port` of the guest. A client whose connection
 * the guest refuses reads the end of the stream at once.
 *
 * -EEXIST: the port was added already in this direction, or (`listen`) something is at `filepath`, other
 * than a socket that a program left behind. -EINVAL also for a path of more than 107 bytes. -ENODEV: the
 * implicit device was disabled and none was added. */
int32_t krun_add_vsock_port2(uint32_t ctx_id, uint32_t port, const char *filepath, bool listen);

#define KRUN_TSI_HIJACK_INET 1
#define KRUN_TSI_HIJACK_UNIX 2

/* Adds the socket device whether or not it has ports. -EEXIST: there is one, or the implicit device was
 * not disabled before. `tsi_features` other than 0 are -ENOTSUP. */
int32_t krun_add_vsock(uint32_t ctx_id, uint32_t tsi_features);

/* Without this there is a device as soon as a port was added. */
int32_t krun_disable_implicit_vsock(uint32_t ctx_id);

/* ------------------------------------------------ devices of other processes */

/* Virtio device ids; krun_add_vhost_user_device takes others of the standard as well. */
#define KRUN_VIRTIO_DEVICE_BLOCK 2
#define KRUN_VIRTIO_DEVICE_CONSOLE 3
#define KRUN_VIRTIO_DEVICE_RNG 4
#define KRUN_VIRTIO_DEVICE_GPU 16
#define KRUN_VIRTIO_DEVICE_RTC 17
#define KRUN_VIRTIO_DEVICE_INPUT 18
#define KRUN_VIRTIO_DEVICE_VSOCK 19
#define KRUN_VIRTIO_DEVICE_SND 25
#define KRUN_VIRTIO_DEVICE_FS 26
#define KRUN_VIRTIO_DEVICE_CAN 36

/* Queues that drivers of some kinds expect, and sizes that their usual back ends take. */
#define KRUN_VHOST_USER_CONSOLE_NUM_QUEUES 4
#define KRUN_VHOST_USER_CONSOLE_QUEUE_SIZES ((uint16_t[]){128, 128, 64, 64})
#define KRUN_VHOST_USER_RNG_NUM_QUEUES 1
#define KRUN_VHOST_USER_RNG_QUEUE_SIZES ((uint16_t[]){256})
#define KRUN_VHOST_USER_RTC_NUM_QUEUES 2
#define KRUN_VHOST_USER_RTC_QUEUE_SIZES ((uint16_t[]){1024, 1024})
#define KRUN_VHOST_USER_INPUT_NUM_QUEUES 2
#define KRUN_VHOST_USER_INPUT_QUEUE_SIZES ((uint16_t[]){1024, 1024})
#define KRUN_VHOST_USER_SND_NUM_QUEUES 4
#define KRUN_VHOST_USER_SND_QUEUE_SIZES ((uint16_t[]){64, 64, 64, 64})
#define KRUN_VHOST_USER_VSOCK_NUM_QUEUES 3
#define KRUN_VHOST_USER_VSOCK_QUEUE_SIZES ((uint16_t[]){128, 128, 128})
#define KRUN_VHOST_USER_CAN_NUM_QUEUES 3
#define KRUN_VHOST_USER_CAN_QUEUE_SIZES ((uint16_t[]){64, 64, 64})
#define KRUN_VHOST_USER_GPU_NUM_QUEUES 2
#define KRUN_VHOST_USER_GPU_QUEUE_SIZES ((uint16_t[]){1024, 1024})

/* A device whose other half is another process (vhost-user): it listens on the unix socket at `socket_path` when the
 * VM starts, gets a descriptor of the guest's whole memory, and serves the device's queues by itself. When it is gone,
 * the device is out of order until the guest's driver resets it, and the process is looked for again; one that keeps
 * notes of requests under way (INFLIGHT_SHMFD) is waited for instead, and goes on. A process for
 * KRUN_VIRTIO_DEVICE_RNG takes the place of the VM's own source of randomness.
 *   name         for messages, or NULL; of a share (KRUN_VIRTIO_DEVICE_FS) the tag too, if the process says none
 *   num_queues   0: as many as the process says, or as the driver expects; at most 64
 *   queue_sizes  most entries of each, powers of two: num_queues of them, or up to a 0 if that is 0; the last one counts
 *                for the queues after it. NULL: what suits the kind of device
 * Whether anybody listens is seen when the VM starts. A GPU needs more of the protocol than there is here. */
int32_t krun_add_vhost_user_device(uint32_t ctx_id, uint32_t device_type, const char *socket_path,
                                   const char *name, uint16_t num_queues, const uint16_t *queue_sizes);

/* ------------------------------------------------------------------- running */

/* A descriptor; writing 8 bytes to it asks the guest to end the workload and power off. */
int32_t krun_get_shutdown_eventfd(uint32_t ctx_id);

/* Consumes the context and runs the VM. Returns only when it could not start; otherwise the process
 * ends with the workload's exit status: its code, 128 + the signal that killed it, 125 when the guest
 * could not be set up, 126 when the program cannot be executed, 127 when it does not exist. It ends as by
 * _exit(): no handlers of atexit() run, and streams are not flushed, which a program that has written to
 * them does before. */
int32_t krun_start_enter(uint32_t ctx_id);

/* ---------------------------------------------- Not served by this version */

/* Beside these functions: the TSI features of krun_add_vsock, which are -ENOTSUP. KRUN_FS_SEMANTICS_SIMPLIFIED is served as COMPLETE. */

int32_t krun_set_mapped_volumes(uint32_t ctx_id, const char *const mapped_volumes[]); /* always -EINVAL */

/* NULL or an empty list asks for nothing and is accepted; ports are -ENOTSUP. */
int32_t krun_set_port_map(uint32_t ctx_id, const char *const port_map[]);

int32_t krun_set_gpu_options(uint32_t ctx_id, uint32_t virgl_flags);
int32_t krun_set_gpu_options2(uint32_t ctx_id, uint32_t virgl_flags, uint64_t shm_size);
int32_t krun_set_gpu_render_server_fd(uint32_t ctx_id, int render_server_fd);
int32_t krun_add_display(uint32_t ctx_id, uint32_t width, uint32_t height);
int32_t krun_display_set_edid(uint32_t ctx_id, uint32_t display_id, const uint8_t *edid_blob,
                              size_t blob_size);
int32_t krun_display_set_dpi(uint32_t ctx_id, uint32_t display_id, uint32_t dpi);
int32_t krun_display_set_physical_size(uint32_t ctx_id, uint32_t display_id, uint16_t width_mm,
                                       uint16_t height_mm);
int32_t krun_display_set_refresh_rate(uint32_t ctx_id, uint32_t display_id, uint32_t refresh_rate);
int32_t krun_set_display_backend(uint32_t ctx_id, const void *display_backend, size_t backend_size);
int32_t krun_set_snd_device(uint32_t ctx_id, bool enable);

int32_t krun_set_firmware(uint32_t ctx_id, const char *firmware_path);
int32_t krun_set_tee_config_file(uint32_t ctx_id, const char *filepath);

#ifdef __cplusplus
}
#endif

#endif /* LIBKRUN_H */
