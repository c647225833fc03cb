//! Downloads from a server that behaves, and from one that does not.

use std::sync::Arc;
use std::time::Duration;

use ghost_domain::ports::{CachedContent, ImageCache, ImageSource};
use ghost_domain::{ByteSize, ChecksumAlgorithm, ChecksumSource, ErrorCode, Result};

use super::support::*;

fn inline(url: String, checksum: &str) -> ImageSource {
    ImageSource {
        url,
        checksum: ChecksumSource::Inline(checksum.parse().unwrap()),
    }
}

async fn pull(fixture: &Fixture, server: &Server, bytes: &[u8]) -> Result<CachedContent> {
    let source = inline(
        server.url("/disk.qcow2"),
        &format!("sha256:{}", sha256(bytes)),
    );
    fixture.cache.pull(&source, Sink::new()).await
}

#[tokio::test]
async fn a_download_is_verified_published_and_known_again() {
    let image = qcow2_disk(8, &[]);
    let copy = image.clone();
    let server = Server::start(move |request, _| match request.path.as_str() {
        "/sums" => Answer::status(
            "200 OK",
            "",
            format!(
                "{}  other\n{}  disk.qcow2\n",
                "0".repeat(128),
                sha512(&copy)
            )
            .as_bytes(),
        ),
        _ => Answer::file(request, &copy, "\"v1\""),
    })
    .await;
    let fixture = Fixture::new();
    let source = ImageSource {
        url: server.url("/disk.qcow2"),
        checksum: ChecksumSource::Url {
            url: server.url("/sums"),
            algorithm: ChecksumAlgorithm::Sha512,
        },
    };
    let sink = Sink::new();
    let content = fixture.cache.pull(&source, sink.clone()).await.unwrap();
    assert_eq!(content.digest.to_string(), sha256(&image));
    assert_eq!(
        content.checksum.as_ref().unwrap().to_string(),
        format!("sha512:{}", sha512(&image))
    );
    assert_eq!(
        sink.phases(),
        [
            "reading the checksums",
            "downloading",
            "verifying",
            "checking",
            "publishing"
        ]
    );
    let total = sink
        .0
        .lock()
        .unwrap()
        .iter()
        .filter_map(|p| p.bytes_total)
        .next()
        .unwrap();
    assert_eq!(total, image.len() as u64);
    assert_eq!(fixture.staged(), Vec::<String>::new());
    assert_eq!(
        fixture.cache.get(&content.digest).await.unwrap(),
        Some(content.clone())
    );

    // The list is asked again, the file is not.
    let again = fixture.cache.pull(&source, Sink::new()).await.unwrap();
    assert_eq!(again, content);
    let paths: Vec<_> = server
        .seen()
        .into_iter()
        .map(|request| request.path)
        .collect();
    assert_eq!(paths, ["/sums", "/disk.qcow2", "/sums"]);
}

#[tokio::test]
async fn a_compressed_download_is_unpacked_after_its_checksum() {
    let disk = raw_disk(8);
    let packed = xz(&disk);
    let copy = packed.clone();
    let server = Server::start(move |request, _| Answer::file(request, &copy, "\"v1\"")).await;
    let fixture = Fixture::new();
    let source = inline(server.url("/disk.raw.xz"), &sha256(&packed));
    let content = fixture.cache.pull(&source, Sink::new()).await.unwrap();
    assert_eq!(content.digest.to_string(), sha256(&disk));
    assert_eq!(
        content.checksum.unwrap().to_string(),
        format!("sha256:{}", sha256(&packed))
    );
    assert_eq!(fixture.staged(), Vec::<String>::new());
}

#[tokio::test]
async fn a_broken_download_goes_on_where_it_stopped() {
    let image = qcow2_disk(8, &[]);
    let copy = image.clone();
    let third = image.len() / 3;
    let server = Server::start(move |request, number| {
        let answer = Answer::file(request, &copy, "\"v1\"");
        if number < 2 {
            answer.broken_after(third)
        } else {
            answer
        }
    })
    .await;
    let fixture = Fixture::new();
    pull(&fixture, &server, &image).await.unwrap();
    let offsets: Vec<_> = server.seen().iter().map(Request::offset).collect();
    assert_eq!(offsets, [0, third, 2 * third]);
    assert!(
        server.seen()[1..]
            .iter()
            .all(|r| r.header("if-range") == Some("\"v1\""))
    );
    assert!(
        server
            .seen()
            .iter()
            .all(|r| r.header("accept-encoding") == Some("identity"))
    );
}

#[tokio::test]
async fn a_later_pull_resumes_what_an_earlier_one_left() {
    let image = qcow2_disk(8, &[]);
    let copy = image.clone();
    let half = image.len() / 2;
    let server = Server::start(move |request, number| {
        let answer = Answer::file(request, &copy, "\"v1\"");
        match number {
            0 => answer.broken_after(half),
            1..=3 => Answer::status("503 Service Unavailable", "", b""),
            _ => answer,
        }
    })
    .await;
    let fixture = Fixture::with(|options| options.download.attempts = 3);
    let error = pull(&fixture, &server, &image).await.unwrap_err();
    assert_eq!(error.code(), ErrorCode::DownloadFailed, "{error}");
    assert_eq!(
        fixture.staged().len(),
        2,
        "the partial and its validators stay"
    );
    // Another cache object in the same folder is what a restarted agent has.
    let cache = ghost_infrastructure::images::DirectoryImageCache::open({
        let mut options =
            ghost_infrastructure::images::ImageCacheOptions::new(fixture.folder.path());
        options.download.first_pause = Duration::from_millis(5);
        options
    })
    .unwrap();
    cache.sweep(&[]).await.unwrap();
    let source = inline(
        server.url("/disk.qcow2"),
        &format!("sha256:{}", sha256(&image)),
    );
    cache.pull(&source, Sink::new()).await.unwrap();
    assert_eq!(server.seen().last().unwrap().offset(), half);
    assert_eq!(fixture.staged(), Vec::<String>::new());
}

#[tokio::test]
async fn a_complete_partial_is_not_downloaded_again() {
    let image = qcow2_disk(8, &[]);
    let copy = image.clone();
    // The length is overstated at first, so the whole file is there but not finished.
    let server = Server::start(move |request, number| {
        if number == 0 {
            let head = format!("Content-Length: {}\r\nETag: \"v1\"\r\n", copy.len());
            Answer::status("200 OK", &head, &copy).then_silence()
        } else {
            Answer::file(request, &copy, "\"v1\"")
        }
    })
    .await;
    let fixture = Fixture::new();
    // hyper ends the body at its length; silence after it is no stall.
    pull(&fixture, &server, &image).await.unwrap();
    assert_eq!(server.seen().len(), 1);
    // Put the partial back as a kill before publishing would leave it.
    let content = fixture.cache.list().await.unwrap().remove(0);
    fixture.cache.remove(&content.digest).await.unwrap();
    let key = {
        use sha2::Digest;
        let text = format!("{}\nsha256:{}", server.url("/disk.qcow2"), sha256(&image));
        hex::encode(&sha2::Sha256::digest(text)[..16])
    };
    let partial = fixture.staging().join(format!("pull-{key}.partial"));
    std::fs::write(&partial, &image).unwrap();
    std::fs::write(
        partial.with_extension("json"),
        format!("{{\"etag\":\"\\\"v1\\\"\",\"total\":{}}}", image.len()),
    )
    .unwrap();
    pull(&fixture, &server, &image).await.unwrap();
    let last = server.seen().pop().unwrap();
    assert_eq!(last.offset(), image.len(), "only the end was asked for");
}

#[tokio::test]
async fn a_file_that_changed_meanwhile_is_downloaded_from_its_start() {
    let image = qcow2_disk(8, &[]);
    let (old, new) = (raw_disk(1), image.clone());
    let server = Server::start(move |request, number| {
        if number == 0 {
            Answer::file(request, &old, "\"old\"").broken_after(100_000)
        } else {
            Answer::file(request, &new, "\"new\"")
        }
    })
    .await;
    let fixture = Fixture::new();
    pull(&fixture, &server, &image).await.unwrap();
    assert_eq!(server.seen()[1].header("if-range"), Some("\"old\""));
}

#[tokio::test]
async fn a_server_that_mixes_versions_is_seen_through() {
    // It honours Range but ignores If-Range: the rest would be another file's.
    let image = qcow2_disk(8, &[]);
    let (old, new) = (raw_disk(1), image.clone());
    let server = Server::start(move |request, number| match number {
        0 => Answer::file(request, &old, "\"old\"").broken_after(100_000),
        1 => {
            let head = format!(
                "Content-Length: {}\r\nContent-Range: bytes 100000-{}/{}\r\nETag: \"new\"\r\n",
                new.len() - 100_000,
                new.len() - 1,
                new.len()
            );
            Answer::status("206 Partial Content", &head, &new[100_000..])
        }
        _ => Answer::file(request, &new, "\"new\""),
    })
    .await;
    let fixture = Fixture::new();
    pull(&fixture, &server, &image).await.unwrap();
    assert_eq!(server.seen().len(), 3);
    assert_eq!(server.seen()[2].offset(), 0);
}

#[tokio::test]
async fn a_server_without_ranges_or_validators_works_too() {
    let image = qcow2_disk(8, &[]);
    for validator in [
        "",
        "ETag: W/\"weak\"\r\n",
        "Last-Modified: Tue, 15 Nov 1994 12:45:26 GMT\r\n",
    ] {
        let copy = image.clone();
        let server = Server::start(move |_, number| {
            let head = format!("Content-Length: {}\r\n{validator}", copy.len());
            let answer = Answer::status("200 OK", &head, &copy);
            if number == 0 {
                answer.broken_after(70_000)
            } else {
                answer
            }
        })
        .await;
        let fixture = Fixture::new();
        pull(&fixture, &server, &image).await.unwrap();
        let ranged = server.seen()[1].header("range").is_some();
        assert_eq!(ranged, validator.starts_with("Last"), "{validator}");
    }
}

#[tokio::test]
async fn lies_about_the_length_end_well() {
    let image = qcow2_disk(8, &[]);
    // Too long a claim: the rest never comes.
    let copy = image.clone();
    let server = Server::start(move |_, _| {
        let head = format!("Content-Length: {}\r\n", copy.len() + 1000);
        Answer::status("200 OK", &head, &copy)
    })
    .await;
    let fixture = Fixture::with(|options| options.download.attempts = 2);
    let error = pull(&fixture, &server, &image).await.unwrap_err();
    assert_eq!(error.code(), ErrorCode::DownloadFailed, "{error}");

    // Too short a claim: what came is not the file.
    let copy = image.clone();
    let server = Server::start(move |_, _| {
        Answer::status(
            "200 OK",
            &format!("Content-Length: {}\r\n", copy.len() - 1000),
            &copy,
        )
    })
    .await;
    let fixture = Fixture::new();
    let error = pull(&fixture, &server, &image).await.unwrap_err();
    assert_eq!(error.code(), ErrorCode::ChecksumMismatch, "{error}");
    assert_eq!(
        fixture.staged(),
        Vec::<String>::new(),
        "the wrong file is removed"
    );

    // No claim at all, and too much of it.
    let copy = image.clone();
    let server = Server::start(move |_, _| Answer::status("200 OK", "", &copy)).await;
    let fixture = Fixture::with(|options| options.max_download = ByteSize::from_bytes(100_000));
    let error = pull(&fixture, &server, &image).await.unwrap_err();
    assert_eq!(error.code(), ErrorCode::ImageTooLarge, "{error}");
    assert_eq!(fixture.staged(), Vec::<String>::new());

    // An absurd claim is refused before a byte is taken.
    let server = Server::start(move |_, _| {
        Answer::status("200 OK", "Content-Length: 4611686018427387904\r\n", b"")
    })
    .await;
    let fixture = Fixture::new();
    let error = pull(&fixture, &server, &image).await.unwrap_err();
    assert_eq!(error.code(), ErrorCode::ImageTooLarge, "{error}");

    // More than the file system has is refused before a byte is taken too.
    let server = Server::start(move |_, _| {
        Answer::status("200 OK", "Content-Length: 1125899906842624\r\n", b"")
    })
    .await;
    let fixture = Fixture::with(|options| options.max_download = ByteSize::from_gib(1 << 30));
    let error = pull(&fixture, &server, &image).await.unwrap_err();
    assert_eq!(error.code(), ErrorCode::DiskFull, "{error}");
    assert_eq!(fixture.staged(), Vec::<String>::new());
}

#[tokio::test]
async fn a_wrong_checksum_removes_the_file() {
    let server = Server::start(|request, _| Answer::file(request, &raw_disk(1), "\"v1\"")).await;
    let fixture = Fixture::new();
    let error = pull(&fixture, &server, b"something else")
        .await
        .unwrap_err();
    assert_eq!(error.code(), ErrorCode::ChecksumMismatch);
    let cause = error.cause().unwrap();
    assert!(cause.contains(&sha256(&raw_disk(1))), "{cause}");
    assert_eq!(fixture.staged(), Vec::<String>::new());
    assert_eq!(fixture.published(), Vec::<String>::new());
}

#[tokio::test]
async fn silence_is_a_fault_like_any_other() {
    let image = qcow2_disk(8, &[]);
    let copy = image.clone();
    let server = Server::start(move |request, number| {
        let answer = Answer::file(request, &copy, "\"v1\"");
        if number == 0 {
            answer.broken_after(50_000).then_silence()
        } else {
            answer
        }
    })
    .await;
    let fixture = Fixture::new();
    pull(&fixture, &server, &image).await.unwrap();
    assert_eq!(server.seen()[1].offset(), 50_000);
}

#[tokio::test]
async fn answers_that_no_retry_mends_end_at_once() {
    for (status, requests) in [
        ("404 Not Found", 1),
        ("403 Forbidden", 1),
        ("410 Gone", 1),
        ("500 Internal Server Error", 3),
        ("429 Too Many Requests", 3),
    ] {
        let server = Server::start(move |_, _| Answer::status(status, "", b"<html>")).await;
        let fixture = Fixture::with(|options| options.download.attempts = 3);
        let error = pull(&fixture, &server, b"x").await.unwrap_err();
        assert_eq!(error.code(), ErrorCode::DownloadFailed, "{status}");
        assert_eq!(server.seen().len(), requests, "{status}");
        assert!(error.message().contains(&status[..3]), "{error}");
    }
    // Nobody listens.
    let port = {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        listener.local_addr().unwrap().port()
    };
    let fixture = Fixture::with(|options| options.download.attempts = 2);
    let source = inline(format!("http://127.0.0.1:{port}/x"), &"a".repeat(64));
    let error = fixture.cache.pull(&source, Sink::new()).await.unwrap_err();
    assert_eq!(error.code(), ErrorCode::DownloadFailed, "{error}");
}

#[tokio::test]
async fn redirects_are_followed_within_the_rules() {
    let image = qcow2_disk(8, &[]);
    let copy = image.clone();
    let server = Server::start(move |request, _| match request.path.as_str() {
        "/disk.qcow2" => Answer::status("302 Found", "Location: /b\r\n", b""),
        "/b" => Answer::status("307 Temporary Redirect", "Location: c?x=1\r\n", b""),
        "/c?x=1" => Answer::file(request, &copy, "\"v1\""),
        "/round" => Answer::status("301 Moved Permanently", "Location: /round\r\n", b""),
        "/private" => Answer::status("302 Found", "Location: http://10.255.255.1/x\r\n", b""),
        "/file" => Answer::status("302 Found", "Location: file:///etc/passwd\r\n", b""),
        _ => Answer::status("302 Found", "", b""),
    })
    .await;
    let fixture = Fixture::with(|options| options.download.attempts = 2);
    pull(&fixture, &server, &image).await.unwrap();
    for path in ["/round", "/private", "/file", "/nowhere"] {
        let source = inline(server.url(path), &"a".repeat(64));
        let error = fixture.cache.pull(&source, Sink::new()).await.unwrap_err();
        assert_eq!(error.code(), ErrorCode::DownloadFailed, "{path}: {error}");
    }
    let source = inline("http://example.com/x".to_owned(), &"a".repeat(64));
    let error = fixture.cache.pull(&source, Sink::new()).await.unwrap_err();
    assert_eq!(error.code(), ErrorCode::InvalidArgument, "{error}");
}

#[tokio::test]
async fn two_callers_share_one_download() {
    let image = qcow2_disk(8, &[]);
    let copy = image.clone();
    let gate = Arc::new(tokio::sync::Semaphore::new(0));
    let opened = Arc::clone(&gate);
    let server = Server::start(move |request, _| {
        let mut answer = Answer::file(request, &copy, "\"v1\"");
        answer.gate = Some(Arc::clone(&gate));
        answer
    })
    .await;
    let fixture = Fixture::new();
    let source = inline(server.url("/disk.qcow2"), &sha256(&image));
    let (first, second, third) = (Sink::new(), Sink::new(), Sink::new());
    let given_up = fixture.cache.pull(&source, third.clone());
    let both = async {
        tokio::join!(
            fixture.cache.pull(&source, first.clone()),
            fixture.cache.pull(&source, second.clone()),
            async {
                // One of three goes away in the middle; the others do not notice.
                tokio::select! {
                    _ = given_up => panic!("the gate is shut"),
                    () = async {
                        while server.seen().is_empty() || third.phases().is_empty() {
                            tokio::time::sleep(Duration::from_millis(1)).await;
                        }
                    } => {}
                }
                opened.add_permits(1);
            }
        )
    };
    let (one, two, ()) = both.await;
    assert_eq!(one.unwrap(), two.unwrap());
    assert_eq!(server.seen().len(), 1);
    for sink in [first, second] {
        assert!(sink.phases().contains(&"downloading".to_owned()));
        let done = sink
            .0
            .lock()
            .unwrap()
            .iter()
            .map(|p| p.bytes_done)
            .max()
            .unwrap();
        assert_eq!(done, image.len() as u64);
    }
}

#[tokio::test]
async fn a_dropped_pull_stops_and_is_resumed() {
    let image = qcow2_disk(8, &[]);
    let copy = image.clone();
    let server = Server::start(move |request, number| {
        let answer = Answer::file(request, &copy, "\"v1\"");
        if number == 0 {
            answer.broken_after(100_000).then_silence()
        } else {
            answer
        }
    })
    .await;
    let fixture = Fixture::with(|options| options.download.stall_timeout = Duration::from_secs(60));
    let source = inline(server.url("/disk.qcow2"), &sha256(&image));
    let sink = Sink::new();
    tokio::select! {
        _ = fixture.cache.pull(&source, sink.clone()) => panic!("the server is silent"),
        () = async {
            while sink.0.lock().unwrap().iter().all(|p| p.bytes_total.is_none()) {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        } => {}
    }
    assert!(fixture.published().is_empty());
    fixture.cache.pull(&source, Sink::new()).await.unwrap();
    assert_eq!(fixture.staged(), Vec::<String>::new());
}

#[tokio::test]
async fn a_hostile_download_does_not_reach_the_cache() {
    let mut image = qcow2_disk(8, &[]);
    image[79] |= 4; // external data file
    let copy = image.clone();
    let server = Server::start(move |request, _| Answer::file(request, &copy, "\"v1\"")).await;
    let fixture = Fixture::new();
    let error = pull(&fixture, &server, &image).await.unwrap_err();
    assert_eq!(error.code(), ErrorCode::UnsafeImage, "{error}");
    assert_eq!(fixture.staged(), Vec::<String>::new());
    assert_eq!(fixture.published(), Vec::<String>::new());
}

#[tokio::test]
async fn a_list_without_the_file_is_an_error_that_names_it() {
    let server = Server::start(|request, _| match request.path.as_str() {
        "/long" => Answer::status("200 OK", "", &vec![b'#'; 2 << 20]),
        _ => Answer::status("200 OK", "", b"<html>not a list</html>"),
    })
    .await;
    let fixture = Fixture::new();
    for list in ["/sums", "/long"] {
        let source = ImageSource {
            url: server.url("/disk.qcow2"),
            checksum: ChecksumSource::Url {
                url: server.url(list),
                algorithm: ChecksumAlgorithm::Sha256,
            },
        };
        let error = fixture.cache.pull(&source, Sink::new()).await.unwrap_err();
        assert_eq!(error.code(), ErrorCode::DownloadFailed, "{error}");
    }
    assert!(
        server
            .seen()
            .iter()
            .all(|request| request.path != "/disk.qcow2")
    );
}
