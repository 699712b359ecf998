//! qcow2 and VMDK images.

use imago::FormatCreateBuilder;
use imago::file::File as Storage;
use imago::qcow2::{Qcow2, Qcow2CreateBuilder};

use super::*;

fn create(path: &Path, size: u64, backing: Option<(&str, &str)>) {
    let file = std::fs::OpenOptions::new().read(true).write(true).create_new(true).open(path).unwrap();
    let options = imago::StorageOpenOptions::new().filename(path).write(true);
    let storage = Storage::from_open_file(file, options).unwrap();
    let mut builder: Qcow2CreateBuilder<Storage> = Qcow2::<Storage>::create_builder(storage).size(size);
    if let Some((name, format)) = backing {
        builder = builder.backing(name.into(), format.into());
    }
    builder.create().unwrap();
}

fn qcow2(path: &Path) -> BlockSpec {
    BlockSpec { format: DiskFormat::Qcow2, ..spec(path) }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]
    #[test]
    fn a_qcow2_disk_is_an_array(all in steps()) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        create(&path, 256 * SECTOR as u64, None);
        like_an_array(qcow2(&path), 256 * SECTOR, &all);
    }

    #[test]
    fn damaged_images_are_refused_or_read(damage in prop::collection::vec((0usize..4096, any::<u8>()), 1..8)) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        create(&path, MIB, None);
        let mut bytes = std::fs::read(&path).unwrap();
        for (at, value) in damage {
            // Most of it in the header.
            let at = if value % 2 == 0 { at % 112 } else { at };
            if let Some(byte) = bytes.get_mut(at) {
                *byte = value;
            }
        }
        std::fs::write(&path, bytes).unwrap();
        if let Ok(block) = Block::new(BlockSpec { read_only: true, ..qcow2(&path) }) {
            let mut h = Harness::new(block);
            let _ = read(&mut h, 0, 1);
        }
    }
}

#[test]
fn a_base_is_opened_when_it_is_allowed() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    std::fs::write(at("base"), vec![1; MIB as usize]).unwrap();
    create(&at("middle"), MIB, Some(("base", "raw")));
    create(&at("top"), MIB, Some(("middle", "qcow2")));
    let refused = Block::new(qcow2(&at("top"))).err().unwrap();
    assert!(matches!(&refused, BlockError::Backing { file, .. } if file == "middle"), "{refused}");
    let top = || BlockSpec { backing: true, ..qcow2(&at("top")) };
    let mut h = Harness::new(Block::new(top()).unwrap());
    assert_eq!(read(&mut h, 7, 2), (vec![1; 2 * SECTOR], 0));
    assert_eq!(write(&mut h, 7, &[2; SECTOR]), 0);
    assert_eq!(read(&mut h, 7, 2), ([[2; SECTOR], [1; SECTOR]].concat(), 0));
    // The base is shared with readers and kept from writers.
    assert!(matches!(Block::new(spec(&at("base"))), Err(BlockError::Locked { .. })));
    Block::new(BlockSpec { read_only: true, ..spec(&at("base")) }).unwrap();
    drop(h);
    assert_eq!(std::fs::read(at("base")).unwrap(), vec![1; MIB as usize]);
    std::fs::remove_file(at("base")).unwrap();
    let missing = Block::new(top()).err().unwrap();
    assert!(missing.to_string().contains("base: No such file"), "{missing}");
}

#[test]
fn a_base_of_unknown_format_and_a_loop_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    create(&at("loop"), MIB, Some(("other", "qcow2")));
    create(&at("other"), MIB, Some(("loop", "qcow2")));
    let read_only = BlockSpec { backing: true, read_only: true, ..qcow2(&at("loop")) };
    assert!(matches!(Block::new(read_only), Err(BlockError::Chain { .. })));
    create(&at("odd"), MIB, Some(("base", "vdi")));
    let odd = Block::new(BlockSpec { backing: true, ..qcow2(&at("odd")) }).err().unwrap();
    assert!(odd.to_string().contains("qemu-img rebase -u -b base"), "{odd}");
}

#[test]
fn a_flat_vmdk_can_be_read() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.vmdk");
    let extent = |name: &str| {
        format!(
            "# Disk DescriptorFile\nversion=1\nCID=fffffffe\nparentCID=ffffffff\ncreateType=\"monolithicFlat\"\n\n\
             RW 2048 FLAT \"{name}\" 0\n"
        )
    };
    std::fs::write(dir.path().join("disk-flat.vmdk"), vec![6; MIB as usize]).unwrap();
    std::fs::write(&path, extent("disk-flat.vmdk")).unwrap();
    let vmdk = |read_only| BlockSpec { format: DiskFormat::Vmdk, read_only, ..spec(&path) };
    let mut h = Harness::new(Block::new(vmdk(true)).unwrap());
    assert_eq!(read(&mut h, 2047, 1), (vec![6; SECTOR], 0));
    assert_eq!(read(&mut h, 2048, 1).1, 1);
    assert!(matches!(Block::new(vmdk(false)), Err(BlockError::VmdkWrite { .. })));
    std::fs::write(&path, extent("/etc/hostname")).unwrap();
    drop(h);
    let outside = Block::new(vmdk(true)).err().unwrap();
    assert!(outside.to_string().contains("is not in the directory"), "{outside}");
}
