//! The serial console.

use ghost_domain::ports::VmStorage;
use ghost_domain::{ErrorCode, VmId};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixListener;

use super::Fixture;

#[tokio::test]
async fn one_person_at_a_time() {
    let fixture = Fixture::new();
    let storage = &fixture.storage;
    let vm = VmId::random();
    storage.create_folder(vm).await.unwrap();
    let error = storage.open_console(vm).await.unwrap_err();
    assert_eq!(error.code(), ErrorCode::VmNotRunning);

    let listener = UnixListener::bind(storage.console_socket_path(vm)).unwrap();
    let mut session = storage.open_console(vm).await.unwrap();
    let (mut qemu, _) = listener.accept().await.unwrap();
    qemu.write_all(b"login: ").await.unwrap();
    assert_eq!(session.reader.read().await.unwrap(), b"login: ");
    session.writer.write(b"root\n").await.unwrap();
    let mut typed = [0; 5];
    qemu.read_exact(&mut typed).await.unwrap();
    assert_eq!(&typed, b"root\n");

    let error = storage.open_console(vm).await.unwrap_err();
    assert_eq!(error.code(), ErrorCode::VmBusy);
    // Half a session still holds it.
    drop(session.writer);
    assert_eq!(
        storage.open_console(vm).await.unwrap_err().code(),
        ErrorCode::VmBusy
    );
    drop(session.reader);
    let mut session = storage.open_console(vm).await.unwrap();
    let (qemu, _) = listener.accept().await.unwrap();
    // The VM goes down: an end, not an error.
    drop(qemu);
    assert_eq!(session.reader.read().await.unwrap(), Vec::<u8>::new());
    drop(session);
    drop(listener);
    // The socket file stays behind a crashed QEMU.
    assert_eq!(
        storage.open_console(vm).await.unwrap_err().code(),
        ErrorCode::VmNotRunning
    );
}

#[tokio::test]
async fn a_swapped_socket_is_not_followed() {
    let fixture = Fixture::new();
    let vm = VmId::random();
    fixture.storage.create_folder(vm).await.unwrap();
    let other = fixture.folder.path().join("other.sock");
    let _listener = UnixListener::bind(&other).unwrap();
    std::os::unix::fs::symlink(&other, fixture.storage.console_socket_path(vm)).unwrap();
    let error = fixture.storage.open_console(vm).await.unwrap_err();
    assert_eq!(error.code(), ErrorCode::IoFailed, "{error}");
}
