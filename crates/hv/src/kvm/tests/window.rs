//! A file in a window that loses its end while the guest is at work on it.

use krun_memory::{GuestAddress, Memfd, Window};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use super::{DEVICE, hardware, next, out, poke, started};
use crate::{Error, Prot, Reply, Vcpu, Vm};

#[test]
fn a_vcpu_goes_on_once_something_is_in_the_place_of_what_is_gone() {
    let Some(kvm) = hardware() else { return };
    let (machine, mut vcpu) = started(&kvm, poke::code());
    let window = Window::new(4096).unwrap();
    // Its length cannot change, but a piece that lies past it is the same.
    let file = Memfd::new(4096).unwrap();
    file.file().write_all_at(&7u32.to_le_bytes(), 0).unwrap();
    window.show(0, 4096, file.file().as_fd(), 0, true).unwrap();
    let _guard = machine.vm.map(GuestAddress(DEVICE), window.mapping(), Prot::ReadWrite).unwrap();
    assert_eq!((next(&mut vcpu), next(&mut vcpu)), (out(0x10, 4, 7), out(0x11, 4, 8)));
    let mut word = [0; 4];
    file.file().read_exact_at(&mut word, 0).unwrap();
    assert_eq!(word, 8u32.to_le_bytes());

    window.show(0, 4096, file.file().as_fd(), 4096, true).unwrap();
    for _ in 0..2 {
        match vcpu.run(Reply::None) {
            Err(Error::Memory { vcpu: 0, stop }) => assert!(stop.reason.contains("KVM_RUN"), "{stop}"),
            other => panic!("{other:?}"),
        }
    }
    window.blank(0, 4096).unwrap();
    assert_eq!((next(&mut vcpu), next(&mut vcpu)), (out(0x10, 4, 0), out(0x11, 4, 1)));
    assert_eq!(next(&mut vcpu), out(0x10, 4, 1));
}

#[test]
fn an_error_in_a_window_does_not_touch_it() {
    let Some(kvm) = hardware() else { return };
    let (machine, mut vcpu) = started(&kvm, &[]);
    let window = Window::new(4096).unwrap();
    let file = Memfd::new(4096).unwrap();
    window.show(0, 4096, file.file().as_fd(), 4096, true).unwrap();
    let _guard = machine.vm.map(GuestAddress(DEVICE), window.mapping(), Prot::ReadWrite).unwrap();
    // Instructions that are gone.
    vcpu.set_boot_state(&crate::BootState::Pvh { rip: DEVICE, rbx: 0 }).unwrap();
    match vcpu.run(Reply::None) {
        Err(Error::Memory { stop, .. }) => assert!(stop.instruction.is_empty(), "{stop}"),
        other => panic!("{other:?}"),
    }
}
