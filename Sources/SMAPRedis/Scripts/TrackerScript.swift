/// One operation of the tracker, as one Lua script: so it happens as a whole, or not at all.
///
/// All scripts take the same keys, the family of one project and the index of pending finishes, and answer with the
/// verdict and the progress after it. Everything is read and checked before the first write, since scripts have no
/// rollback. They begin with `#!lua`, so that they are refused as a whole when memory is out (Redis 7).
package struct TrackerScript: Sendable {
    package let name: String
    package let source: String

    /// - Parameter flags: `no-writes` for what only reads, `allow-oom` for what gives memory back.
    init(_ name: String, flags: String = "", _ body: String) {
        self.name = name
        source = "#!lua\(flags.isEmpty ? "" : " flags=\(flags)")\n" + Self.prelude + body
    }

    /// What every script needs: the fields of the hash, checked, and the answer.
    private static let prelude = """
        local main, ok, err, batches, pending, index = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5], KEYS[6]

        local h = redis.call('HMGET', main, 'status', 'total', 'done', 'errors', '_sealed', '_finished', '_finish_id',
            '_kind', '_items', '_started_ms', '_gen')
        local status, sealed, finished, finish_id, kind = h[1], h[5] == '1', h[6] == '1', h[7], h[8]

        -- Siblings leave out counters that are zero; anything but digits is junk.
        local function number(text)
          if not text then return 0 end
          if #text > 15 or not string.match(text, '^%d+$') then return nil end
          return tonumber(text)
        end
        local total, done, errors, items = number(h[2]), number(h[3]), number(h[4]), number(h[9])

        local function reply(verdict)
          return {verdict, status or '', total or 0, done or 0, errors or 0, sealed and 1 or 0,
            finished and finish_id or ''}
        end
        local missing = not status and not h[2] and not h[3] and not h[4]
        local corrupt = not missing and (not status or not total or not done or not errors or not items)

        -- Every update keeps the family for another while; a pending finish keeps it until it is published.
        local function touch(ttl)
          if finished and redis.call('EXISTS', pending) == 1 then return end
          redis.call('EXPIRE', main, ttl)
          redis.call('EXPIRE', ok, ttl)
          redis.call('EXPIRE', err, ttl)
          redis.call('EXPIRE', batches, ttl)
        end

        local function over()
          return redis.call('EXISTS', pending) == 1 and 'finishPending' or 'alreadyFinished'
        end

        -- A sibling that has set DONE has finished the project in its own way: there is no second finish.
        local function may_finish()
          return sealed and done >= total and not finished and status ~= 'DONE' and status ~= 'FAILED'
        end

        -- Fails on keys of another type before anything is written.
        local function check_finish_keys(project)
          redis.call('HGET', pending, 'event_id')
          redis.call('SISMEMBER', index, project)
        end

        local function finish(project, candidate)
          local time = redis.call('TIME')
          local now = time[1] * 1000 + math.floor(time[2] / 1000)
          local seconds = (now - (tonumber(h[10] or '') or now)) / 1000
          finished, status, finish_id = true, 'DONE', finish_id or candidate
          redis.call('HSET', main, 'status', 'DONE', '_finished', '1', '_finish_id', finish_id)
          redis.call('HSET', pending, 'event_id', finish_id, 'generation', h[11] or '1', 'decided_ms',
            string.format('%.0f', now), 'data', string.format(
              '{"total":%.0f,"done":%.0f,"errors":%.0f,"duration_seconds":%.3f}', total, done, errors, seconds))
          redis.call('SADD', index, project)
          redis.call('PERSIST', main)
          redis.call('PERSIST', ok)
          redis.call('PERSIST', err)
          redis.call('PERSIST', batches)
          return reply('finished')
        end

        local function whole(n) return string.format('%.0f', n) end


        """

    /// ARGV: time to live, finish event id.
    static let start = TrackerScript(
        "start",
        """
        if corrupt then return reply('corrupt') end
        if not missing then return reply('exists') end
        local time = redis.call('TIME')
        -- What an earlier life of this project has left behind must not count in this one.
        redis.call('DEL', ok, err, batches)
        status, total, done, errors = 'INITIALIZING', 0, 0, 0
        redis.call('HSET', main, 'status', status, 'total', '0', 'done', '0', 'errors', '0', '_layout', 'flat',
          '_gen', '1', '_finish_id', ARGV[2], '_started_ms', whole(time[1] * 1000 + math.floor(time[2] / 1000)))
        redis.call('EXPIRE', main, ARGV[1])
        return reply('started')
        """)

    /// ARGV: time to live, count, batch.
    static let expect = TrackerScript(
        "expect",
        """
        if missing then return reply('unknownProject') end
        if corrupt then return reply('corrupt') end
        if redis.call('SISMEMBER', batches, ARGV[3]) == 1 then return reply('duplicate') end
        if finished or status == 'DONE' or status == 'FAILED' then return reply('alreadyFinished') end
        if sealed then return reply('alreadySealed') end
        local sum = total + tonumber(ARGV[2])
        if sum > 999999999999999 then return redis.error_reply('ERR the total has more than 15 digits') end
        total = sum
        redis.call('SADD', batches, ARGV[3])
        redis.call('HSET', main, 'total', whole(total))
        if status == 'INITIALIZING' then
          status = 'CRAWLING'
          redis.call('HSET', main, 'status', status)
        end
        touch(ARGV[1])
        return reply('expected')
        """)

    /// ARGV: time to live, finish event id, project, total or nothing.
    static let seal = TrackerScript(
        "seal",
        """
        if missing then return reply('unknownProject') end
        if corrupt then return reply('corrupt') end
        local final = ARGV[4] == '' and total or tonumber(ARGV[4])
        if finished then
          if final ~= total then return reply('alreadyFinished') end
          return reply(redis.call('EXISTS', pending) == 1 and 'finishPending' or 'duplicate')
        end
        if status == 'DONE' or status == 'FAILED' then return reply('alreadyFinished') end
        if final < done then return reply('totalBelowDone') end
        check_finish_keys(ARGV[3])
        total, sealed, status = final, true, 'PROCESSING'
        redis.call('HSET', main, 'total', whole(total), '_sealed', '1', 'status', status)
        if may_finish() then return finish(ARGV[3], ARGV[2]) end
        touch(ARGV[1])
        return reply('sealed')
        """)

    /// ARGV: time to live, finish event id, project, kind (`i` or `n`), item, outcome (`s` or `f`).
    package static let advance = TrackerScript(
        "advance",
        """
        if missing then return reply('unknownProject') end
        if corrupt then return reply('corrupt') end
        local is_index, item, failed = ARGV[4] == 'i', ARGV[5], ARGV[6] == 'f'
        if kind and kind ~= ARGV[4] then return reply('itemKindMismatch') end

        local was_ok, was_err
        if is_index then
          was_ok, was_err = redis.call('GETBIT', ok, item) == 1, redis.call('GETBIT', err, item) == 1
        else
          was_ok, was_err = redis.call('SISMEMBER', ok, item) == 1, redis.call('SISMEMBER', err, item) == 1
        end
        local function remember(key, flag)
          if is_index then
            redis.call('SETBIT', key, item, flag and 1 or 0)
          else
            redis.call(flag and 'SADD' or 'SREM', key, item)
          end
        end

        if was_ok or was_err then
          if was_err and not was_ok and not failed then
            remember(ok, true)
            remember(err, false)
            if errors > 0 then errors = redis.call('HINCRBY', main, 'errors', -1) end
            touch(ARGV[1])
            return reply('reclassified')
          end
          return reply(finished and over() or 'duplicate')
        end
        if items > 0 and redis.call('EXISTS', ok, err) == 0 then return reply('memoryLost') end
        if sealed and (done >= total or (is_index and tonumber(item) >= total)) then
          return reply('unexpectedItem')
        end
        if sealed and done + 1 >= total then check_finish_keys(ARGV[3]) end

        remember(failed and err or ok, true)
        done = redis.call('HINCRBY', main, 'done', 1)
        if failed then errors = redis.call('HINCRBY', main, 'errors', 1) end
        redis.call('HINCRBY', main, '_items', 1)
        if not kind then redis.call('HSET', main, '_kind', ARGV[4]) end
        if may_finish() then return finish(ARGV[3], ARGV[2]) end
        touch(ARGV[1])
        return reply('counted')
        """)

    /// ARGV: time to live.
    static let fail = TrackerScript(
        "fail",
        """
        if missing then return reply('unknownProject') end
        if corrupt then return reply('corrupt') end
        if finished or status == 'DONE' then return reply('alreadyFinished') end
        status = 'FAILED'
        redis.call('HSET', main, 'status', status)
        touch(ARGV[1])
        return reply('failed')
        """)

    static let progress = TrackerScript(
        "progress", flags: "no-writes",
        """
        if missing then return reply('unknownProject') end
        if corrupt then return reply('corrupt') end
        return reply('counted')
        """)

    /// ARGV: time to live, event id, project. Gives memory back, so it is allowed when there is none.
    static let clear = TrackerScript(
        "clear", flags: "allow-oom",
        """
        if redis.call('HGET', pending, 'event_id') ~= ARGV[2] then return 0 end
        redis.call('DEL', pending)
        redis.call('SREM', index, ARGV[3])
        touch(ARGV[1])
        return 1
        """)
}
