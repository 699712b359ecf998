//! Whatever a guest sends.

use krun_memory::VolatileSlice;
use proptest::prelude::*;

use super::client::{Client, longs, words};
use crate::fs::flat::{FlatSink, FlatSource};
use crate::fs::{Content, FileData, Overlay};

fn client() -> Client {
    Client::with(|s| {
        let root = s.source.clone().unwrap();
        std::fs::create_dir(root.join("d")).unwrap();
        std::fs::write(root.join("d/f"), "data").unwrap();
        let content = Content::File { data: FileData::from(&b"v"[..]), mode: 0o755, one_shot: true };
        s.overlays = vec![Overlay { path: "v".into(), content, listed: true }];
        // Bytes at random may name real files: none is to be changed.
        s.read_only = true;
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn never_panics_nor_overruns(
        requests in proptest::collection::vec(
            (0u32..56, 0u64..6, proptest::collection::vec(any::<u8>(), 0..120), 0usize..300, any::<bool>()),
            1..40,
        )
    ) {
        let mut c = client();
        for (op, node, body, room, honest) in requests {
            let len = if honest { 40 + body.len() as u32 } else { body.first().map_or(0, |b| u32::from(*b) << 8) };
            let mut bytes = [words(&[len, op]), longs(&[1, node]), words(&[0, 0, 0, 0]), body].concat();
            let mut space = vec![0u8; room];
            let mut source = FlatSource::new(vec![VolatileSlice::from(&mut bytes[..])]);
            let sink = FlatSink::new(vec![VolatileSlice::from(&mut space[..])]);
            if let Ok(n) = c.server.serve(&mut source, sink) {
                prop_assert!(n as usize <= room);
                prop_assert!(n == 0 || n >= 16);
            }
        }
    }

    #[test]
    fn fuzzing_starts_from_here(data in proptest::collection::vec(any::<u8>(), 0..400)) {
        crate::fs::fuzz_one(&data);
    }
}

#[test]
fn a_request_without_a_head_is_an_error_of_the_device() {
    let mut c = client();
    let mut space = [0u8; 64];
    let mut short = [0u8; 39];
    let sink = FlatSink::new(vec![VolatileSlice::from(&mut space[..])]);
    let mut source = FlatSource::new(vec![VolatileSlice::from(&mut short[..])]);
    assert!(c.server.serve(&mut source, sink).is_err());
    // And so is one with no room for an answer.
    let mut bytes = [words(&[40, 3]), longs(&[1, 1]), words(&[0; 4])].concat();
    let mut source = FlatSource::new(vec![VolatileSlice::from(&mut bytes[..])]);
    let sink = FlatSink::new(vec![VolatileSlice::from(&mut space[..15])]);
    assert!(c.server.serve(&mut source, sink).is_err());
}
