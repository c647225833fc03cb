//! What Core's principals never do, and what needs the owner's leave to enter.

use ghost_application::access::CreateKeyCommand;
use ghost_application::guest::{GuestTarget, SetLockdownCommand};
use ghost_application::image::{ImportImageCommand, PullImageCommand};
use ghost_application::vm::UpdateVmCommand;
use ghost_domain::fleet::CorePermissions;
use ghost_domain::{ErrorCode, Principal, Result, Role, VmChange};

use super::{Joined, through_core};
use crate::world::Agent;

fn code<T>(outcome: Result<T>) -> Option<ErrorCode> {
    outcome.err().map(|error| error.code())
}

/// A Core that says `admin`, and an agent that believed it: the use cases do not.
fn believed() -> Principal {
    Principal {
        role: Role::Admin,
        ..through_core()
    }
}

#[tokio::test]
async fn credentials_lockdown_audit_and_foreign_images_are_never_core_s() {
    let joined = Joined::with(CorePermissions::OperateAndEnter).await;
    let all = &joined.agent.use_cases;
    let core = believed();
    let denied = Some(ErrorCode::CorePermissionDenied);
    assert_eq!(
        code(all.create_token.execute(&core, Role::Admin, true).await),
        denied
    );
    assert_eq!(code(all.list_certificates.execute(&core).await), denied);
    assert_eq!(
        code(all.revoke_certificate.execute(&core, "a").await),
        denied
    );
    let key = CreateKeyCommand {
        name: "k".into(),
        role: Role::Admin,
        guest_access: true,
        lifetime: None,
    };
    assert_eq!(code(all.create_key.execute(&core, key).await), denied);
    assert_eq!(code(all.list_keys.execute(&core).await), denied);
    assert_eq!(code(all.revoke_key.execute(&core, "a").await), denied);
    for active in [true, false] {
        let command = SetLockdownCommand {
            active,
            ..SetLockdownCommand::default()
        };
        assert_eq!(code(all.set_lockdown.execute(&core, command).await), denied);
    }
    assert_eq!(
        code(all.list_audit.execute(&core, &Default::default()).await),
        denied
    );
    assert_eq!(code(all.verify_audit.execute(&core).await), denied);
    let pull = PullImageCommand {
        name: "evil".into(),
        url: Some("https://evil.example/image.qcow2".into()),
        checksum: Some(format!("sha256:{}", "0".repeat(64))),
        request_id: None,
    };
    assert_eq!(code(all.pull_image.execute(&core, pull).await), denied);
    let import = ImportImageCommand {
        name: "evil".into(),
        file_name: "evil.qcow2".into(),
        request_id: None,
    };
    assert_eq!(code(all.import_image.execute(&core, import).await), denied);
    assert_eq!(code(all.reconnect_core.execute(&core).await), denied);
    let me = Agent::me();
    assert_eq!(
        code(all.reconnect_core.execute(&me).await),
        Some(ErrorCode::NotEnrolled)
    );
    // A name of the catalogue is what Core may ask for.
    let pull = PullImageCommand {
        name: "no-such".into(),
        url: None,
        checksum: None,
        request_id: None,
    };
    let outcome = all.pull_image.execute(&core, pull).await;
    assert_eq!(code(outcome), Some(ErrorCode::ImageNotFound));
}

#[tokio::test]
async fn guests_and_consoles_need_the_owner_s_leave() {
    for (permissions, may) in [
        (CorePermissions::Operate, false),
        (CorePermissions::OperateAndEnter, true),
    ] {
        let joined = Joined::with(permissions).await;
        joined.agent.created("web", true).await;
        let all = &joined.agent.use_cases;
        let core = through_core();
        let target = GuestTarget {
            vm: "web".into(),
            request_id: "r".into(),
        };
        let entered = all
            .stat_guest_file
            .execute(&core, &target, "/etc/hostname", true)
            .await;
        let console = all.open_console.execute(&core, "web").await;
        let log = all.open_log.execute(&core, "web", None).await;
        let access = all.set_guest_access.execute(&core, &target, true).await;
        let opened = UpdateVmCommand {
            vm: "web".into(),
            change: VmChange {
                guest_access: Some(true),
                ..VmChange::default()
            },
            ..UpdateVmCommand::default()
        };
        let opened = all.update_vm.execute(&core, opened).await;
        for (what, outcome) in [
            ("file", code(entered)),
            ("console", code(console)),
            ("log", code(log)),
            ("access", code(access)),
            ("update", code(opened)),
        ] {
            let denied = outcome == Some(ErrorCode::CorePermissionDenied);
            assert_eq!(denied, !may, "{permissions}: {what}: {outcome:?}");
        }
        // To look at a guest's telemetry is not to enter it.
        let me = Agent::me();
        assert!(all.get_guest_status.execute(&core, "web").await.is_ok());
        assert!(all.get_vm.execute(&me, "web").await.is_ok());
    }
}
