//! Holds the checked-in code to the `.proto` files. With `GHOST_PROTO_WRITE=1` (`make proto`) it
//! writes the code anew instead. An ordinary build needs neither protoc nor a build script.

use std::fs;
use std::path::Path;

#[test]
fn generated_code_matches_the_protocol() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut files = Vec::new();
    for package in ["ghost/agent/v1", "ghost/core/v1", "ghost/guest/v1"] {
        for entry in fs::read_dir(root.join("proto").join(package)).unwrap() {
            files.push(format!(
                "{package}/{}",
                entry.unwrap().file_name().display()
            ));
        }
    }
    files.sort();
    let descriptors = protox::compile(&files, [root.join("proto")]).unwrap();

    let out = tempfile::tempdir().unwrap();
    tonic_prost_build::configure()
        .out_dir(out.path())
        .file_descriptor_set_path(out.path().join("descriptors.bin"))
        .btree_map(".")
        .bytes(".ghost.agent.v1.ImportImageRequest")
        // File contents and output are passed on, not copied.
        .bytes(".ghost.agent.v1.ExecInput")
        .bytes(".ghost.agent.v1.ExecOutput")
        .bytes(".ghost.agent.v1.ReadGuestFileResponse")
        .bytes(".ghost.agent.v1.WriteGuestFileRequest")
        .bytes(".ghost.guest.v1.StreamData")
        .bytes(".ghost.core.v1.CarriedBytes")
        .compile_fds(descriptors.clone())
        .unwrap();
    fs::write(
        out.path().join("descriptors.bin"),
        prost::Message::encode_to_vec(&descriptors),
    )
    .unwrap();

    let checked_in = root.join("src/generated");
    for entry in fs::read_dir(out.path()).unwrap() {
        let entry = entry.unwrap();
        let fresh = fs::read(entry.path()).unwrap();
        let target = checked_in.join(entry.file_name());
        if std::env::var_os("GHOST_PROTO_WRITE").is_some() {
            fs::create_dir_all(&checked_in).unwrap();
            fs::write(&target, &fresh).unwrap();
        } else {
            let old = fs::read(&target).unwrap_or_default();
            assert!(
                old == fresh,
                "{} is not what the .proto files say; run `make proto`",
                target.display()
            );
        }
    }
}
