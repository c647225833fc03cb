//! Every route against every identity. The routes come from the table, which a unit test holds to
//! the OpenAPI document.

use ghost_domain::Principal;
use ghost_presentation::Access;
use ghost_presentation::http::routes::{BATWA_ROUTES, ROUTES};

use super::*;
use crate::world::unknown_key;

async fn status_of(shell: &Shell, method: &str, path: &str, key: Option<&str>) -> (u16, String) {
    let path = path
        .replace("{vm}", "web")
        .replace("{vm_name}", "web")
        .replace("{agent_id}", "elsewhere")
        .replace("{name}", "tiny")
        .replace("{id}", "0");
    let mut request = Request::builder().method(method).uri(path);
    if let Some(key) = key {
        request = request.header("x-api-key", key);
    }
    let response = shell
        .router
        .clone()
        .oneshot(request.body(Body::empty()).unwrap())
        .await
        .unwrap();
    let status = response.status();
    if status.is_success() {
        // Streams have no end to read to.
        return (status.as_u16(), String::new());
    }
    let body = axum::body::to_bytes(response.into_body(), 1 << 20)
        .await
        .unwrap();
    let problem: serde_json::Value = serde_json::from_slice(&body).unwrap();
    (
        status.as_u16(),
        problem["code"].as_str().unwrap_or_default().to_owned(),
    )
}

/// Whether a route is not for a role, or for one whose credential does not enter guests.
fn refused(access: Access, role: Role, guests: bool) -> bool {
    match access {
        Access::Anyone => false,
        Access::Role(needed) => role < needed,
        Access::Guests => role < Role::Operator || !guests,
    }
}

#[tokio::test]
async fn every_route_against_every_identity() {
    let shell = Shell::with(Options {
        batwa: true,
        ..Options::default()
    })
    .await;
    let world = &shell.world;
    let revoked = world.key(Role::Admin).await;
    let id = revoked.split('_').nth(1).unwrap();
    let revoke = &world.use_cases().revoke_key;
    revoke.execute(&Principal::agent(), id).await.unwrap();
    let callers = [
        ("none", None, None, false),
        ("garbage", Some("nonsense".to_owned()), None, false),
        (
            "unknown",
            Some(unknown_key().expose().to_owned()),
            None,
            false,
        ),
        ("revoked", Some(revoked), None, true),
        (
            "viewer",
            Some(world.key(Role::Viewer).await),
            Some(Role::Viewer),
            true,
        ),
        (
            "operator",
            Some(world.key(Role::Operator).await),
            Some(Role::Operator),
            true,
        ),
        (
            "admin",
            Some(world.key(Role::Admin).await),
            Some(Role::Admin),
            true,
        ),
        (
            "confined operator",
            Some(world.key_with(Role::Operator, false).await),
            Some(Role::Operator),
            false,
        ),
        (
            "confined admin",
            Some(world.key_with(Role::Admin, false).await),
            Some(Role::Admin),
            false,
        ),
    ];
    for (name, key, role, guests) in &callers {
        for route in ROUTES.iter().chain(BATWA_ROUTES) {
            // Clients of Batwa know 403 alone.
            let nobody = if BATWA_ROUTES.contains(route) {
                403
            } else {
                401
            };
            let (status, code) = status_of(&shell, route.method, route.path, key.as_deref()).await;
            let what = format!("{name}: {} {}", route.method, route.path);
            match (route.access, role) {
                (Access::Role(_) | Access::Guests, None) => {
                    assert_eq!(
                        (status, code.as_str()),
                        (nobody, "unauthenticated"),
                        "{what}"
                    );
                }
                (access, Some(role)) if refused(access, *role, *guests) => {
                    assert_eq!(
                        (status, code.as_str()),
                        (403, "permission_denied"),
                        "{what}"
                    );
                }
                (Access::Anyone, _) | (_, Some(_)) => {
                    assert!(status != 401 && status != 403, "{what}: {status} {code}");
                }
            }
        }
    }
}

#[tokio::test]
async fn a_wrong_secret_of_a_known_key_is_refused_like_an_unknown_one() {
    let shell = Shell::new().await;
    let mut wrong = shell.key.clone();
    let last = wrong.pop().unwrap();
    wrong.push(if last == '0' { '1' } else { '0' });
    let ask = async |key: &str| {
        let request = Request::get("/v1/vms").header("authorization", format!("Bearer {key}"));
        let answer = shell.send(request.body(Body::empty()).unwrap()).await;
        assert_eq!(answer.headers["www-authenticate"], "Bearer realm=\"ghost\"");
        (answer.status, answer.json())
    };
    let known = ask(&wrong).await;
    assert_eq!(known.0, StatusCode::UNAUTHORIZED);
    assert_eq!(known, ask(unknown_key().expose()).await);
}
