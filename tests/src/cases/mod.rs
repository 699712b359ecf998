//! The cases, one file each.

use crate::harness::Case;
use crate::network;

mod bad_input;
mod balloon;
mod bare;
mod bytes;
mod c_abi;
mod consoles;
mod disk;
mod disk_faults;
mod disk_root;
mod driver;
mod endings;
mod exit_codes;
mod files;
mod init;
mod input;
mod kernels;
mod leftovers;
mod loads;
mod many_devices;
mod processors;
mod programs;
mod several;
mod share_cache;
mod share_dax;
mod share_faults;
mod share_locks;
mod share_users;
mod shares;
mod signals;
mod stdio;
mod suites;
mod terminal;
mod vhost_user;
mod vhost_user_media;
mod vhost_user_rtc;
mod vsock;
mod vsock_seqpacket;

/// Every case.
pub const ALL: &[Case] = &[
    exit_codes::CASE,
    stdio::CASE,
    stdio::BULK,
    bytes::CASE,
    files::CASE,
    files::MANY,
    shares::CASE,
    share_cache::CASE,
    share_cache::IDMAP,
    share_dax::CASE,
    share_dax::BUFFERS,
    share_dax::SHORTER,
    share_dax::ROOT,
    share_faults::SPACE,
    share_faults::CHANGES,
    share_faults::GONE,
    share_locks::CASE,
    share_users::CASE,
    suites::PJDFSTEST,
    suites::FSX,
    loads::PGBENCH,
    loads::DBENCH,
    loads::STRESS,
    loads::STRESS_FILES,
    init::CASE,
    processors::CASE,
    processors::NESTED,
    processors::HUGE,
    endings::CASE,
    signals::CASE,
    several::CASE,
    leftovers::CASE,
    terminal::CASE,
    terminal::CONTINUED,
    terminal::RESTORED,
    terminal::FOREGROUND,
    consoles::LOG,
    consoles::SERIAL,
    consoles::SEVERAL,
    consoles::ORDER,
    programs::PYTHON,
    programs::GIT,
    programs::COMPILE,
    programs::DPKG,
    kernels::CASE,
    kernels::BZIMAGE,
    many_devices::CASE,
    bad_input::CASE,
    c_abi::CASE,
    c_abi::FORK,
    c_abi::USER,
    c_abi::TERMINALS,
    balloon::CASE,
    input::CASE,
    input::EVDEV,
    bare::CASE,
    bare::SMBIOS_IN_LINUX,
    network::passt::PASST,
    network::passt::RESTART,
    network::gvproxy::GVPROXY,
    network::peers::TAP,
    network::peers::DATAGRAM,
    network::queues::QUEUES,
    network::slow::SLOW,
    network::slow::DOWN,
    network::slow::SHORT,
    network::lease::LEASE,
    network::routers::ROUTERS,
    disk::CASE,
    disk::SIZE,
    disk::FORMATS,
    disk::FIO,
    disk_root::CASE,
    disk_faults::SPACE,
    disk_faults::POWER_CUT,
    vsock::CASE,
    vsock::MANY,
    vsock::BULK,
    vsock::STUCK,
    vsock::KILLED,
    vsock_seqpacket::CASE,
    vhost_user::BLOCK,
    vhost_user::RNG,
    vhost_user::FS,
    vhost_user::VSOCK,
    vhost_user::CONSOLE,
    vhost_user_media::INPUT,
    vhost_user_media::SOUND,
    vhost_user_media::CAN,
    vhost_user_rtc::CASE,
    vhost_user_media::HUNG,
];
