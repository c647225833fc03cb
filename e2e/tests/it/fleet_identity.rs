//! Who is let into a fleet, by certificates that ended, were revoked, copied, or were never meant for
//! what they are shown for. The refusals are those of the real programs.

use std::process::Command;
use std::time::Duration;

use ghost_e2e::agent::{Agent, Builder as AgentBuilder};
use ghost_e2e::clock::FakeClock;
use ghost_e2e::core::Core;
use ghost_e2e::fleet::{JOIN, RETURN, brisk, link};
use ghost_e2e::wait;
use ghost_proto::core::LINK_PROTOCOL;
use ghost_proto::core::v1::enrolment_service_client::EnrolmentServiceClient;
use ghost_proto::core::v1::fleet_service_client::FleetServiceClient;
use ghost_proto::core::v1::{ListHostsRequest, RenewHostRequest};
use serde_json::Value;

use crate::taken_core::{
    Papers, alert, authority, channel, code, hello, host_uri, stolen, user_uri,
};

const DAY: i64 = 24 * 3600;

/// A Core and a host on loopback.
fn joined() -> (Core, Agent) {
    let core = brisk().start();
    let agent = AgentBuilder::simulated().start();
    let done = agent.enroll(&core.host_token("acme"), "pc");
    assert_eq!(done.code, 0, "{}{}", done.stdout, done.stderr);
    core.wait_host("pc", "online", JOIN);
    (core, agent)
}

/// Waits until a host says that Core does not want it, and why.
fn wait_refused(agent: &Agent, why: &str, within: Duration) -> Value {
    wait::until_ok(&format!("it is refused: {why}"), within, || {
        let link = link(agent);
        let reason = link["reason"].as_str().unwrap_or_default();
        if link["state"] == "refused" && reason.contains(why) {
            Ok(link)
        } else {
            Err(link.to_string())
        }
    })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn wrong_papers_are_refused_for_links_and_calls_each_with_its_reason() {
    let (core, agent) = tokio::task::spawn_blocking(joined).await.unwrap();
    let id = link(&agent)["host_id"].as_str().unwrap().to_owned();
    let somebody = uuid::Uuid::new_v4().to_string();
    let ours = stolen(&core, 0);
    let past = stolen(&core, -2 * DAY);
    let folder = tempfile::tempdir().unwrap();
    let other = authority(folder.path(), 0);
    let host = host_uri("acme", &id);

    // What TLS refuses never comes to a word of any protocol.
    for (of, word) in [(&past, "CertificateExpired"), (&other, "fatal alert")] {
        for (uri, protocol) in [
            (host.clone(), LINK_PROTOCOL),
            (user_uri(&somebody), b"h2".as_slice()),
        ] {
            let refused = alert(&core, Papers::issue(of, &uri, Some(1)), protocol).await;
            assert!(refused.contains(word), "{uri}: {refused}");
        }
    }

    // Links.
    for (uri, answer) in [
        (host_uri("acme", &somebody), "unknown_host"),
        // The right host, in a tenant that it is not in.
        (host_uri("widgets", &id), "unknown_host"),
    ] {
        let papers = Papers::issue(&ours, &uri, Some(1));
        assert_eq!(hello(&core, papers, 1).await.unwrap(), answer, "{uri}");
    }
    // Nobody who is no host gets as far as a goodbye.
    for uri in [
        user_uri(&somebody),
        "spiffe://ghost.local/core".to_owned(),
        "spiffe://elsewhere.example/tenant/acme/host/".to_owned() + &id,
    ] {
        let papers = Papers::issue(&ours, &uri, Some(1));
        let refused = hello(&core, papers, 1).await.unwrap_err();
        assert!(!refused.contains("Welcome"), "{uri}: {refused}");
    }
    let log = core.log();
    assert!(
        log.matches("a link of one who is no host was refused")
            .count()
            >= 3,
        "{log}"
    );

    // Calls.
    let list = async |papers: Option<Papers>| {
        let channel = channel(&core, papers).await?;
        let mut client = FleetServiceClient::new(channel);
        match client.list_hosts(ListHostsRequest::default()).await {
            Ok(_) => Ok(()),
            Err(status) => Err(format!("{}: {}", code(&status), status.message())),
        }
    };
    let refused = list(Some(Papers::of_host(&agent))).await.unwrap_err();
    assert_eq!(refused, "unauthenticated: a host is not an operator");
    let refused = list(None).await.unwrap_err();
    assert!(
        refused.starts_with("unauthenticated: no client certificate"),
        "{refused}"
    );
    let nobody = Papers::issue(&ours, &user_uri(&somebody), None);
    let refused = list(Some(nobody)).await.unwrap_err();
    assert!(
        refused.starts_with("unauthenticated: this certificate's user is not known"),
        "{refused}"
    );
    let person = Papers::issue(&ours, &user_uri(&somebody), None);
    let mut renewal = EnrolmentServiceClient::new(channel(&core, Some(person)).await.unwrap());
    let refused = renewal
        .renew(RenewHostRequest::default())
        .await
        .unwrap_err();
    assert_eq!(code(&refused), "unauthenticated", "{refused:?}");
    assert!(refused.message().contains("for hosts only"), "{refused:?}");

    // None of it did the host any harm.
    assert_eq!(core.host("pc")["state"], "online");
    tokio::task::spawn_blocking(move || agent.audit())
        .await
        .unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_revoked_host_is_cut_off_at_once_and_a_revoked_person_too() {
    let (core, agent) = tokio::task::spawn_blocking(joined).await.unwrap();
    let papers = || Papers::of_host(&agent);
    let uri = format!("https://{}", core.address());
    let alice = core.person("alice");
    let token = core.token(&["--tenant", "acme", "--role", "operator"]);
    alice.ok(&[
        "context",
        "add",
        "fleet",
        "--endpoint",
        &uri,
        "--token",
        &token,
        "--use",
    ]);
    alice.ok(&["--host", "pc", "list"]);
    let user = core.ctl().json(&["user", "list"])[0]["id"]
        .as_str()
        .unwrap()
        .to_owned();
    core.ctl().ok(&["user", "revoke", &user]);
    let error = alice.fails(&["--host", "pc", "list"], 6, "unauthenticated");
    assert!(error.to_string().contains("revoked"), "{error}");

    core.ctl().ok(&["host", "remove", "pc", "--force"]);
    // Five minutes are promised; nothing but the word of Core has to come.
    let told = wait_refused(&agent, "revoked", JOIN);
    assert!(
        told["reason"].as_str().unwrap().contains("removed"),
        "{told}"
    );
    // Its certificate is good for hours, and opens nothing any more.
    assert_eq!(hello(&core, papers(), 1).await.unwrap(), "unknown_host");
    agent.ctl().ok(&["core", "reconnect"]);
    wait_refused(&agent, "unknown_host", JOIN);
    let mut renewal = EnrolmentServiceClient::new(channel(&core, Some(papers())).await.unwrap());
    let renewal = renewal.renew(RenewHostRequest::default());
    let refused = renewal.await.unwrap_err();
    assert_eq!(code(&refused), "host_not_found", "{refused:?}");
    assert_eq!(agent.ctl().run(&["list"]).code, 0, "local work goes on");
}

#[test]
fn a_person_who_was_away_for_longer_than_a_certificate_lives_is_told_what_to_do() {
    let mut clock = FakeClock::new();
    let mut core = brisk();
    for (name, value) in clock.environment() {
        core = core.env(name, &value);
    }
    let core = core.start();
    let mut alice = core.person("alice");
    for (name, value) in clock.environment() {
        alice = alice.with_env(name, value);
    }
    let uri = format!("https://{}", core.address());
    let join = |context: &str| {
        let token = core.token(&["--tenant", "acme", "--role", "operator"]);
        alice.ok(&[
            "context",
            "add",
            context,
            "--endpoint",
            &uri,
            "--token",
            &token,
            "--use",
        ]);
    };
    join("fleet");
    alice.ok(&["host", "list"]);
    // In use it renews itself: day after day, each longer than half of its life.
    for _ in 0..3 {
        clock.forward(Duration::from_secs(17 * 3600));
        alice.ok(&["host", "list"]);
    }
    clock.forward(Duration::from_secs(25 * 3600));
    let error = alice.fails(&["host", "list"], 6, "unauthenticated");
    assert!(error["hint"].to_string().contains("token"), "{error}");
    join("again");
    alice.ok(&["host", "list"]);
}

#[test]
fn a_copied_identity_is_locked_until_its_owner_decides() {
    let (core, agent) = joined();
    let copy = AgentBuilder::simulated().prepare();
    let copied = Command::new("cp")
        .arg("-a")
        .args([agent.data_dir().join("core"), copy.data_dir().join("core")])
        .status();
    assert!(copied.unwrap().success());
    let mut copy = copy;
    copy.start();
    let host = core.wait_host("pc", "locked", RETURN);
    assert!(
        host["state_reason"]
            .as_str()
            .unwrap()
            .contains("two machines"),
        "{host}"
    );
    for one in [&agent, &copy] {
        wait_refused(one, "cloned_identity", RETURN);
        assert_eq!(one.ctl().run(&["list"]).code, 0, "local work goes on");
    }
    let error = core
        .ctl()
        .fails(&["--host", "pc", "list"], 4, "host_locked");
    let hint = error["hint"].as_str().unwrap();
    // At the endpoint that was asked, and of no host.
    assert!(hint.ends_with(" host unlock pc"), "{error}");
    assert!(!hint.contains("--host"), "{error}");

    // The owner takes the copy away, and lets the host in again.
    copy.stop();
    core.ctl().ok(&["host", "unlock", "pc"]);
    agent.ctl().ok(&["core", "reconnect"]);
    core.wait_host("pc", "online", RETURN);
    core.ctl().ok(&["--host", "pc", "list"]);
}

#[test]
fn another_core_at_the_same_address_is_not_obeyed() {
    let (mut core, agent) = joined();
    core.kill();
    let mut other = brisk().prepare();
    other.set("grpc.listen", core.address().to_string());
    other.set("core.addresses", vec![core.address().to_string()]);
    other.start();
    let told = wait::until_ok("the host sees that it is another one", RETURN, || {
        let link = link(&agent);
        match link["reason"].as_str() {
            Some(reason) if reason.contains("is not the Core that this host joined") => Ok(link),
            _ => Err(link.to_string()),
        }
    });
    assert_eq!(told["state"], "waiting");
    assert!(other.host("pc").is_null());
    other.stop();
    core.start();
    core.wait_host("pc", "online", RETURN);
    agent.audit();
}
